"""Products with sparse arrays: check the operands, choose a backend, run it.

The layout the kernels know is token-major: ``y = x @ A.T`` with ``x`` ``(T, K)`` and ``A`` ``(M, K)``. ``A @ b`` is
the same product transposed. Products that reduce along M (``x @ A``, ``A.T @ y``) cut across the sparse groups; they
decode A and run as dense products.

Where the operands are decides what runs: NumPy arrays and what DLPack says is on the host by :mod:`nmsparse.cpu`,
arrays on a GPU by :mod:`nmsparse.cuda`. Both operands have to be in one place; nothing is moved silently.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from . import formats, reference
from .errors import NMSparseError, UnsupportedDeviceError
from .formats import Pattern, SparseArray, Transposed, parse
from .formats.checks import DTYPES, as_weight, common_dtype, is_on_gpu, resolve_scores
from .formats.selection import importance

__all__ = ["array", "grouped_matmul", "matmul"]


@functools.cache
def _cuda(part: str) -> ModuleType:
    """A module of the GPU backend, imported when the first array on a GPU turns up."""
    return import_module(f".cuda.{part}", __package__)


SparseArray._cuda = staticmethod(_cuda)


def _buffers() -> ModuleType:
    """What passes memory between torch and NumPy, imported when the first tensor turns up."""
    return import_module(".torch.buffers", __package__)


SparseArray._buffers = staticmethod(_buffers)


def is_host_tensor(x: Any) -> bool:
    """Whether ``x`` is a tensor of torch on the host; imports nothing.

    >>> is_host_tensor(np.ones(3))
    False
    """
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor) and not x.is_cuda


F = TypeVar("F", bound=Callable[..., Any])


def takes_tensors(function: F) -> F:
    """A function of NumPy arrays that takes tensors of torch on the host too, without a copy, and then returns them."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        if any(map(is_host_tensor, (*arguments, *options.values()))):
            return _buffers().call(function, arguments, options)
        return function(*arguments, **options)

    return wrapper  # type: ignore[return-value]


@takes_tensors
def array(
    w: Any,
    pattern: str | Pattern,
    *,
    scores: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    strict: bool = False,
) -> SparseArray:
    """Prune and pack ``w`` ``(M, K)`` or ``(E, M, K)`` by the compiled kernels; bitwise what ``from_dense`` gives.

    ``scores`` (same shape) rank instead of ``|w|``; ``mask`` (bool) says what to keep; ``strict=True`` keeps every
    non-zero of ``w``. The last two raise :class:`~nmsparse.errors.NMSparseError` where the pattern has no room.

    A weight on a GPU gives an array there. 2:4 of float16 or bfloat16 without options is pruned and packed by the GPU;
    all else makes a round trip through the host, with the same result.

    >>> array(np.eye(64, 128, dtype=np.float32), "samoyeds:1:2:64")
    SamoyedsArray(float32[64, 128], samoyeds:1:2:64, nnz=2048, device='cpu')
    """
    if is_on_gpu(w):
        return _array_on_gpu(w, parse(pattern), scores, mask, strict)
    w, pattern = as_weight(w, "array"), parse(pattern)
    ranks, wanted = resolve_scores(w, scores, mask, strict)
    ranks = None if ranks is None else importance(w, ranks)
    if np.float64 in (w.dtype, getattr(ranks, "dtype", None)):  # the kernels rank in float32
        return formats.from_dense(w, pattern, scores=scores, mask=mask, strict=strict)
    from .cpu.pack import pack

    packed = formats.CLASSES[pattern.format](pattern, w.shape, pack(w, pattern, ranks))
    return packed if wanted is None else packed._restrict(wanted, strict)


def _array_on_gpu(w: Any, pattern: Pattern, scores: Any, mask: Any, strict: bool) -> SparseArray:
    here = _cuda("array").view(w)
    if scores is None and mask is None and not strict and _cuda("pack").prunes(pattern, here.dtype):
        return _cuda("pack").array(w, pattern)
    scores, mask = (_cuda("array").view(a).numpy() if is_on_gpu(a) else a for a in (scores, mask))
    return array(here.numpy(), pattern, scores=scores, mask=mask, strict=strict).to_device(f"cuda:{here.device}")


def matmul(a: Any, b: Any, *, out: Any = None, config: Any = None) -> Any:
    """``a @ b`` where one is a sparse array ``A``, ``(M, K)`` or ``(E, M, K)`` for a batch of experts, or its ``A.T``.

    ==============  =======================  ==============  =====================================
    product         dense operand            result          runs
    ==============  =======================  ==============  =====================================
    ``x @ A.T``     ``(…, K)``               ``(…, M)``      on the stored values (token-major)
    ``A @ b``       ``(K,)`` or ``(K, N)``   ``(M[, N])``    on the stored values
    ``x @ A``       ``(…, M)``               ``(…, K)``      decoded
    ``A.T @ b``     ``(M,)`` or ``(M, N)``   ``(K[, N])``    decoded
    ==============  =======================  ==============  =====================================

    With an expert axis the dense operand has it too: ``(E, T, K) @ A.T``. fp16 and bf16 operands are multiplied and
    summed in fp32, float64 in float64; the result has the dtype of both, or
    the wider one (float16 with bfloat16: float32). ``out`` receives it if given.

    On a GPU: ``x @ A.T`` and ``A @ b`` of one matrix, both operands float16 or bfloat16; the result is an array of the
    same library as ``x``, computed on its current stream. ``config`` chooses the kernel there, None leaves it to the
    library. Raises :class:`~nmsparse.errors.NMSparseError` for operands that do not fit each other and
    :class:`~nmsparse.errors.UnsupportedDeviceError` for operands in different places.

    >>> A = formats.NMArray.from_dense(np.eye(4, dtype=np.float32))
    >>> A @ np.array([1, 2, 3, 4], np.float32)
    array([1., 2., 3., 4.], dtype=float32)
    """
    # First the call that has to be quick: on a GPU the kernel takes microseconds.
    if type(b) is Transposed and (gpu := b.T._gpu) >= 0 and gpu == _gpu_of(a) and len(b.T.shape) == 2:
        return _gpu_matmul()(a, b.T, out=out, config=config)
    sparse = [isinstance(operand, (SparseArray, Transposed)) for operand in (a, b)]
    if sum(sparse) != 1:
        raise NMSparseError(
            f"matmul: expected one sparse and one dense operand, got {type(a).__name__} and {type(b).__name__}; "
            "decode one with todense() if both are sparse"
        )
    if _one_place(a, b, "matmul") >= 0:
        return _matmul_on_gpu(a, b, out, config)
    if is_host_tensor(b if sparse[0] else a):
        return _buffers().call(matmul, (a, b), {"out": out, "config": config})
    if config is not None:
        raise NMSparseError(f"matmul: config chooses a kernel of a GPU, these operands are on the host: got {config!r}")
    if sparse[0]:
        vector = np.ndim(b) == 1
        b = as_activation(b, "matmul")
        columns = b[:, None] if vector else np.swapaxes(b, -1, -2) if b.ndim > 1 else b
        if b.ndim not in (1, a.ndim):
            raise NMSparseError(f"matmul: expected a {a.ndim}-D right operand for {a!r}, got shape {b.shape}")
        tokens = columns.T if vector else columns
        y = np.swapaxes(_tokens_times(tokens, a.T, a, b), -1, -2)
        y = y[:, 0] if vector else y
    else:
        a = as_activation(a, "matmul")
        y = _tokens_times(a, b, a, b)
    if out is None:
        return np.ascontiguousarray(y)
    if not isinstance(out, np.ndarray) or out.shape != y.shape or out.dtype != y.dtype:
        raise NMSparseError(f"matmul: expected out as {y.dtype.name}{list(y.shape)}, got {_describe(out)}")
    out[...] = y
    return out


SparseArray._product = staticmethod(matmul)


@functools.lru_cache(maxsize=1)
def _gpu_matmul() -> Any:
    return _cuda("matmul").matmul


def _gpu_of(x: Any) -> int:
    """Number of the GPU that ``x`` is on, -1 on the host."""
    if isinstance(x, np.ndarray):
        return -1
    try:
        return x.get_device()  # torch
    except AttributeError:
        pass
    if isinstance(x, (SparseArray, Transposed)):
        return (x if isinstance(x, SparseArray) else x.T)._gpu
    if not is_on_gpu(x):
        return -1
    return x.__dlpack_device__()[1] if hasattr(x, "__dlpack_device__") else _cuda("array").view(x).device


def _one_place(a: Any, b: Any, who: str) -> int:
    """Number of the GPU that both operands are on, -1 on the host; an error if they are not in one place."""
    places = _gpu_of(a), _gpu_of(b)
    if places[0] != places[1]:
        left, right = ("the host" if place < 0 else f"cuda:{place}" for place in places)
        raise UnsupportedDeviceError(
            f"{who}: {_describe(a)} is on {left} and {_describe(b)} on {right}; bring both to one place, "
            "a sparse array with its to_device('cuda:N') or to_device('cpu')"
        )
    return places[0]


def _matmul_on_gpu(a: Any, b: Any, out: Any, config: Any) -> Any:
    """The products on a GPU other than the quick one."""
    w = a if isinstance(a, (SparseArray, Transposed)) else b
    if w.ndim != 2:
        raise UnsupportedDeviceError(f"matmul: batches of experts have no GPU kernel yet; multiply by each {w!r}[e]")
    if not isinstance(a, SparseArray):  # A.T @ b, x @ A
        raise UnsupportedDeviceError(
            "matmul: a product that reduces along M cuts across the sparse groups and has no GPU kernel; multiply by "
            f"the dense weight, torch.from_dlpack(A.todense()), of {w!r}"
        )
    if len(b.shape) == 1:
        return _gpu_matmul()(b, a, out=out, config=config)
    if len(b.shape) != 2:
        raise NMSparseError(f"matmul: expected a 2-D right operand for {a!r}, got shape {tuple(b.shape)}")
    tokens = b.T.contiguous() if hasattr(b, "is_cuda") else b.T  # torch, of which the kernel wants token-major memory
    y = _gpu_matmul()(tokens, a, out=None if out is None else out.T, config=config)
    return y.T if out is None else out


def _tokens_times(x: np.ndarray, w: SparseArray | Transposed, left: Any, right: Any) -> np.ndarray:
    """``x @ w`` for token-major ``x``; ``left`` and ``right`` are the caller's operands, for the message."""
    batch = w.shape[:-2]
    if x.ndim == 0 or x.shape[-1] != w.shape[-2] or (batch and (x.ndim != 3 or x.shape[:1] != batch)):
        raise NMSparseError(
            f"matmul: dimension mismatch, {np.shape(left)} @ {np.shape(right)}: the inner sizes must agree"
            + (", and so must the expert axis" if batch else "")
        )
    dtype = common_dtype(x.dtype, w.dtype)
    lead, tokens = x.shape[:-1], x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if isinstance(w, SparseArray) or dtype == np.float64:
        compute = np.promote_types(dtype, np.float32)
        return (x.astype(compute) @ w.todense().astype(compute)).astype(dtype)
    from .cpu import matmul as cpu

    tokens = np.ascontiguousarray(tokens, np.float32)
    if batch:
        ends = np.arange(1, batch[0] + 1, dtype=np.int64) * lead[-1]
        y = cpu.grouped_matmul(w.T, tokens, ends)
    else:
        y = cpu.matmul(w.T, tokens)
    return y.reshape(*lead, w.shape[-1]).astype(dtype, copy=False)


@takes_tensors
def grouped_matmul(x: Any, w: SparseArray, offsets: Any) -> Any:
    """Rows ``offsets[e-1]:offsets[e]`` of ``x`` ``(S, K)`` times ``w[e].T`` of ``w`` ``(E, M, K)``: ``(S, M)``.

    ``offsets`` ``(E,)`` are cumulative ends, int32 or int64, the last one S: the ``offs`` convention of
    ``torch.nn.functional.grouped_mm``. Experts without rows cost nothing. On a GPU the offsets are there too, and the
    host does not look at them: wrong ones are not noticed.

    >>> w = formats.random((2, 4, 16), "2:4", rng=0)
    >>> x = np.ones((3, 16), np.float32)
    >>> y = grouped_matmul(x, w, np.array([1, 3], np.int32))
    >>> np.allclose(y, [w[0] @ x[0], w[1] @ x[1], w[1] @ x[2]])
    True
    """
    if not isinstance(w, SparseArray) or w.ndim != 3:
        raise NMSparseError(f"grouped_matmul: expected w as a sparse array (E, M, K), got {_describe(w)}")
    if _one_place(x, w, "grouped_matmul") >= 0:
        return _cuda("experts").grouped_matmul(x, w, offsets)
    x = as_activation(x, "grouped_matmul")
    if x.ndim != 2 or x.shape[1] != w.shape[2]:
        raise NMSparseError(f"grouped_matmul: expected x (S, K={w.shape[2]}), got shape {x.shape}")
    offsets = check_offsets(offsets, w.shape[0], len(x))
    dtype = common_dtype(x.dtype, w.dtype)
    if dtype == np.float64:
        return reference.grouped_matmul(x, w, offsets)
    from .cpu import matmul as cpu

    return cpu.grouped_matmul(w, np.ascontiguousarray(x, np.float32), offsets).astype(dtype, copy=False)


def check_offsets(offsets: Any, experts: int, rows: int) -> np.ndarray:
    """``offsets`` if they split ``rows`` rows among ``experts`` experts."""
    offsets = np.asarray(offsets)
    if offsets.dtype not in (np.int32, np.int64) or offsets.shape != (experts,):
        raise NMSparseError(f"offsets: expected int32 or int64[{experts}], got {_describe(offsets)}")
    ends = np.concatenate([[0], offsets])
    if (np.diff(ends) < 0).any() or ends[-1] != rows:
        raise NMSparseError(
            f"offsets: expected non-decreasing ends of the experts' rows, the last one {rows}, got {offsets.tolist()}"
        )
    return offsets


def as_activation(x: Any, who: str) -> np.ndarray:
    """``x`` as a NumPy array of a supported floating dtype; other libraries' CPU arrays are viewed through DLPack."""
    if not isinstance(x, (np.ndarray, list, tuple, float, int)) and hasattr(x, "__dlpack_device__"):
        if is_on_gpu(x):
            kind = int(x.__dlpack_device__()[0])
            raise UnsupportedDeviceError(
                f"{who}: expected activations on the host, got {type(x).__name__} on DLPack device type {kind}"
            )
        x = np.from_dlpack(x)
    x = np.asarray(x)
    if x.dtype not in DTYPES:
        names = ", ".join(d.name for d in DTYPES)
        raise NMSparseError(
            f"{who}: expected activations in {names}, got {x.dtype}; convert with astype(numpy.float32)"
        )
    return x


def _describe(value: Any) -> str:
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{value.dtype.name}{list(value.shape)}"
    return repr(value) if isinstance(value, SparseArray) else type(value).__name__
