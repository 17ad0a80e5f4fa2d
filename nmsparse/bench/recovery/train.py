"""Training against the clock: as many steps as fit, and how good the model is on the way."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .step import make_loss, mixed

__all__ = ["LENGTH", "Recipe", "Trained", "bits", "train"]

LENGTH = 512  # bytes of a window
LOOKED_AT = 300  # windows of the held-out text for a point of the curve
AHEAD = 16  # steps that the host may be ahead of the GPU


class Recipe(NamedTuple):
    """How the optimiser goes: AdamW, a short warm-up, then a cosine down to a hundredth. ``decay`` and what follows are
    arguments of :class:`~nmsparse.torch.train.MaskTraining`."""

    batch: int = 128
    rate: float = 2e-3
    warmup: float = 0.03
    router_loss: float = 0.01
    decay: float = 2e-4
    fade: float = 0.0
    refresh: int = 10
    frozen: float = 0.4


class Trained(NamedTuple):
    """Steps in so many seconds, points ``(seconds, bits)`` on the way, and why the step ran without a compiler."""

    steps: int
    seconds: float
    curve: list[tuple[float, float]]
    uncompiled: str | None


@torch.no_grad()
def bits(model: Any, text: Tensor, windows: int | None = None) -> float:
    """Bits per byte of ``text``: windows of LENGTH that do not overlap, the first byte of each not scored."""
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for tokens in text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)[:windows].long().split(64):
        with mixed(text):
            logits = model(input_ids=tokens, output_router_logits=False, use_cache=False).logits
        total += F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
        count += tokens[:, 1:].numel()
    model.train(was_training)
    return total / count / math.log(2)


def train(
    model: Any, text: Tensor, heldout: Tensor, recipe: Recipe, seconds: float, *, seed: int, compiled: bool,
    masks: Any = None, every: float = math.inf,
) -> Trained:  # fmt: skip
    """Train for ``seconds``, masks included; compiling and looking at the held-out text do not count.

    A point of the curve is taken ``every`` so many seconds.
    """
    model.train()
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == wide], "weight_decay": 0.1 * wide}
              for wide in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=text.is_cuda)
    generator, offsets = torch.Generator(text.device).manual_seed(seed), torch.arange(LENGTH, device=text.device)

    def windows() -> Tensor:
        starts = torch.randint(len(text) - LENGTH + 1, (recipe.batch,), device=text.device, generator=generator)
        return text[starts[:, None] + offsets].long()

    torch.compiler.reset()  # each run has its own modules, and a function is compiled for a few only
    loss, uncompiled = make_loss(model, recipe.router_loss, compiled=compiled), None if compiled else "not asked for"
    try:
        _warm_up(loss, optimizer, windows)
    except Exception as error:  # whatever a compiler may raise
        if not compiled:
            raise
        uncompiled = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        print(f"not compiled: {uncompiled}", flush=True)
        loss = make_loss(model, recipe.router_loss, compiled=False)
        _warm_up(loss, optimizer, windows)
    curve: list[tuple[float, float]] = []
    steps, paused, look, begin = 0, 0.0, every, time.perf_counter()
    while (elapsed := time.perf_counter() - begin - paused) < seconds:
        if elapsed >= look:
            _wait(text)
            stopped = time.perf_counter()
            curve.append((elapsed, bits(model, heldout, LOOKED_AT)))
            look += every
            paused += time.perf_counter() - stopped
            continue
        done = elapsed / seconds
        rate = min(1.0, done / recipe.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * rate
        with mixed(text):
            found = loss(windows())
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if masks is not None:
            masks.step(done)
        steps += 1
        if steps % AHEAD == 0:
            _wait(text)  # so that the clock is the GPU's
    _wait(text)
    return Trained(steps, time.perf_counter() - begin - paused, curve, uncompiled)


def _warm_up(loss: Any, optimizer: Any, windows: Any) -> None:
    """Compiles and allocates; changes nothing."""
    for _ in range(2):
        tokens = windows()
        with mixed(tokens):
            found = loss(tokens)
        found.backward()
        optimizer.zero_grad(set_to_none=True)
    _wait(tokens)


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
