"""The walk through any Mixture-of-Experts model of ``transformers``, and the statistics that need a backward pass.

Since version 5, ``transformers`` keeps the experts of a layer in one module with ``gate_up_proj`` (E, 2I, H) and
``down_proj`` (E, H, I), called with the tokens and their routing; that is all this relies on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import NMSparseError, require
from ..moe import SparseExperts
from .channels import hidden_axis
from .record import Batch, LayerRecord

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh"}


_WINDOWS_AT_ONCE = 4


class _Enough(Exception):
    """Raised inside a forward pass when the layer of interest has been reached."""


class ModelWalk:
    """A walk through ``model``, which is changed: every layer is replaced by its pruned one as the walk goes on.

    ``batches`` are calibration batches of token ids ``(B, T)``, int64 tensors on the device of the model. A layer's
    tokens are made by running the model up to it, so that nothing but one layer's statistics is kept in memory.

    Raises :class:`~nmsparse.errors.NMSparseError` for a model without experts in the layout above, such as one of
    ``transformers`` before 5.
    """

    def __init__(self, model: Any, batches: Sequence[Any]):
        self.model, self.inputs = model.eval(), batches
        self.modules = expert_modules(model)

    def __len__(self) -> int:
        return len(self.modules)

    def experts(self, layer: int) -> SparseExperts:
        module = self.modules[layer]
        return SparseExperts(_weight(module.gate_up_proj), _weight(module.down_proj), activation_of(self.model))

    def batches(self, layer: int) -> Iterator[Batch]:
        torch = require("torch", "torch")
        module, norm = self.modules[layer], norm_before(self.model, self.modules[layer])
        for ids in self.inputs:
            seen: list[Batch] = []
            stream: list[Any] = []

            def take(module: Any, arguments: tuple, seen: list[Batch] = seen, stream: list[Any] = stream) -> None:
                seen.append(_batch(*arguments, *stream))
                raise _Enough

            def keep(norm: Any, arguments: tuple, stream: list[Any] = stream) -> None:
                stream[:] = arguments[:1]

            handles = [module.register_forward_pre_hook(take)]
            if norm is not None:
                handles.append(norm.register_forward_pre_hook(keep))
            try:
                with torch.no_grad():
                    self.model(ids)
            except _Enough:
                pass
            finally:
                for handle in handles:
                    handle.remove()
            yield from seen

    def replace(self, layer: int, gate_up: np.ndarray, down: np.ndarray) -> None:
        torch, module = require("torch", "torch"), self.modules[layer]
        with torch.no_grad():
            for weight, new in ((module.gate_up_proj, gate_up), (module.down_proj, down)):
                if weight.shape != new.shape:
                    weight.data = torch.empty(new.shape, dtype=weight.dtype, device=weight.device)
                weight.copy_(torch.from_numpy(np.ascontiguousarray(new)))


def load_walk(source: str | PathLike[str], text: str | PathLike[str], windows: int, length: int) -> ModelWalk:
    """The walk through a checkpoint directory that ``transformers`` can load, with its own tokenizer.

    ``text`` is a UTF-8 file; ``windows`` pieces of ``length`` tokens, evenly spread over it, are the calibration.
    """
    transformers, torch = require("transformers", "test"), require("torch", "torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    content = Path(text).read_text(encoding="utf-8", errors="replace")
    ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
    available = len(ids) // length
    if not available:
        raise NMSparseError(
            f"{text} has {len(ids)} tokens, expected at least one window of {length}; use a longer text"
        )
    pieces = ids[: available * length].reshape(available, length)[:: max(1, available // windows)][:windows]
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    return ModelWalk(model, pieces.split(_WINDOWS_AT_ONCE))


def reorder_model(model: Any, order: np.ndarray) -> None:
    """Put the hidden dimension of ``model`` in ``order`` ``(H,)``, in place: its outputs stay, to rounding.

    See :mod:`nmsparse.calibration.channels`, whose errors it raises before anything is changed.
    """
    torch = require("torch", "torch")
    axes = [(parameter, hidden_axis(name)) for name, parameter in model.named_parameters()]
    with torch.no_grad():
        for parameter, axis in axes:
            if axis is not None:
                index = torch.from_numpy(order).to(parameter.device)
                parameter.copy_(parameter.index_select(axis, index))


def expert_modules(model: Any) -> list[Any]:
    """The modules of ``model`` that hold the experts of a layer, first layer first."""
    found = [
        module
        for module in model.modules()
        if all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in ("gate_up_proj", "down_proj"))
    ]
    if not found:
        raise NMSparseError(
            f"{type(model).__name__} holds no experts as gate_up_proj (E, 2I, H) and down_proj (E, H, I); expected a "
            "Mixture-of-Experts model of transformers 5 or later"
        )
    return found


def norm_before(model: Any, experts: Any) -> Any:
    """The norm between the residual stream and these experts, where the decoder layer names it as Llama's do."""
    name = next(name for name, module in model.named_modules() if module is experts)
    layer = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    return getattr(layer, "post_attention_layernorm", None)


def activation_of(model: Any) -> str:
    """Our name of the activation that a model's config names."""
    name = getattr(model.config, "hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise NMSparseError(f"hidden_act: expected one of {', '.join(_ACTIVATIONS)}, this model has {name!r}")
    return _ACTIVATIONS[name]


def observe(model: Any, batches: Iterable[Any], *, hessians: bool = False) -> list[LayerRecord]:
    """One forward and one backward pass over each batch of token ids ``(B, T)``: the record of every layer.

    The loss is the model's own for predicting the next token, summed over batches. Fills what
    :class:`~nmsparse.calibration.record.LayerRecord` lists, gradients included, but for ``turns`` and ``stream``, which
    a walk fills. ``hessians`` are asked for with care:
    those of all layers are in memory together.
    """
    walk = ModelWalk(model, ())
    records = []
    for layer in range(len(walk)):
        dense = walk.experts(layer)
        weights = (np.asarray(w, np.float32) for w in (dense.gate_up, dense.down))
        records.append(LayerRecord(*weights, activation=dense.activation, hessians=hessians))
    for ids in batches:
        with ExitStack() as stack:
            for module, record in zip(walk.modules, records, strict=True):
                stack.enter_context(_observed(module, record))
            model(ids, labels=ids).loss.backward()
        model.zero_grad()
    return records


@contextmanager
def _observed(module: Any, record: LayerRecord) -> Iterator[None]:
    """While this lasts, the module computes its experts here, one by one, so that gradients can be had."""
    functional = require("torch", "torch").nn.functional
    forward = module.forward

    def run(x: Any, ids: Any, weights: Any) -> Any:
        record.add(_batch(x, ids, weights))
        out = x.new_zeros(x.shape)
        for e in ids.unique().tolist():
            tokens, slots = (ids == e).nonzero(as_tuple=True)
            gate, up = functional.linear(x[tokens], module.gate_up_proj[e]).chunk(2, dim=-1)
            h = module.act_fn(gate) * up
            y = functional.linear(h, module.down_proj[e]) * weights[tokens, slots, None]
            gradients: dict[str, np.ndarray] = {}

            def keep(name: str, e: int = e, gradients: dict[str, np.ndarray] = gradients) -> Any:
                def hook(gradient: Any) -> None:
                    gradients[name] = _array(gradient)
                    if len(gradients) == 2:
                        record.add_gradients(e, gradients["h"], gradients["y"])

                return hook

            h.register_hook(keep("h"))
            y.register_hook(keep("y"))
            out = out.index_add(0, tokens, y.to(out.dtype))
        return out

    module.forward = run
    try:
        yield
    finally:
        module.forward = forward


def _batch(*tensors: Any) -> Batch:
    return Batch(*(_array(t).reshape(-1, t.shape[-1]) for t in tensors))


def _weight(tensor: Any) -> np.ndarray:
    """A weight in its own dtype, bfloat16 included."""
    torch, tensor = require("torch", "torch"), tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _array(tensor: Any) -> np.ndarray:
    """A float tensor as float32 (NumPy has no bfloat16), any other as it is."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
