"""The words of :mod:`nmsparse.cuda.kernels.gemv` on NumPy: each warp a thread, its 32 lanes an axis of every register.

Registers hold NaN or invalid metadata until they are loaded, shared memory is NaN until it is written, and warps take
turns in an order drawn from a seed, so a forgotten load, barrier or zero shows as NaN.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from ....formats import fragments, metadata
from ...layout import BLOCK, EMPTY, VALUE_BYTES
from .crew import Crew, KernelError

__all__ = ["launch", "make"]

LANE = np.arange(fragments.LANES)
READ = fragments.meta_lanes(0)
NOBODY = 0xFFFF  # a NaN of both dtypes
_here = threading.local()  # .warp, .cta: who the running thread is

Words = dict[str, Any]


class _Cta:
    """One CTA: its number, shared memory for the sums, and the barrier."""

    def __init__(self, cfg: Any, number: int, crew: Crew):
        self.number, self.crew, self.warps = number, crew, cfg.warps
        self.shared = np.full((cfg.warps, cfg.sets, cfg.tile_t, 16), np.nan, np.float32)
        self.tokens = np.full((cfg.warps, cfg.batch, cfg.tile_t, BLOCK), NOBODY, np.uint16)
        self.copies: list[list[Callable[[], None]]] = [[] for _ in range(cfg.warps)]  # of each warp, under way
        self.arrived = 0

    def barrier(self, warp: int) -> None:
        self.arrived += 1
        phase = -(-self.arrived // self.warps)
        self.crew.pause(f"warp {warp}", lambda: self.arrived >= phase * self.warps, lambda: "the block's barrier")


def make(cfg: Any) -> SimpleNamespace:
    """The words for ``cfg``, as the namespace that a kernel text receives."""
    words = weight_words(cfg), _place_words(cfg), _token_words(cfg), sum_words(cfg), _store_words(cfg)
    return SimpleNamespace(BLOCKS_A_ROUND=cfg.warps * cfg.batch, **{k: v for part in words for k, v in part.items()})


def number() -> int:
    """Of the CTA that the running warp is in."""
    return _here.cta.number


def nothing(*args: Any) -> int:
    """What weights without runs say in place of a word of Samoyeds."""
    return 0


def weight_words(cfg: Any) -> Words:
    """Weights, and of Samoyeds their picks, from memory to registers."""
    batch = cfg.batch

    def load_weights(a: Any, e: Any, w_gmem: np.ndarray, slab: int, block: int, k_blocks: int) -> None:
        down, part = divmod(slab, 4)
        for i in range(batch):
            if block + i < k_blocks:
                raw = w_gmem[down, block + i]
                values = raw[:VALUE_BYTES].view(np.uint32).reshape(8, 4, 32)  # rows of 8, chunks of 8 columns
                for step in range(2):
                    for register in range(4):
                        a[:, 8 * i + 4 * step + register] = values[2 * part + register % 2, 2 * step + register // 2]
                words = raw[VALUE_BYTES:].view(np.uint32).reshape(4, 16, 2)
                e[:, 2 * i : 2 * i + 2] = words[part, LANE // 4 * 2 + LANE % 2]
            else:
                a[:, 8 * i : 8 * i + 8], e[:, 2 * i : 2 * i + 2] = 0, EMPTY * 0x10001

    def load_picks(odd: Any, picks: Any, block: int, run_blocks: int, runs: int) -> None:
        for i in range(batch):
            run = min((block + i) // run_blocks, runs - 1)
            odd[:, 2 * i], odd[:, 2 * i + 1] = picks[0][:, run], picks[1][:, run]

    return {
        "first_block": lambda: _here.warp * batch,
        "load_weights": load_weights,
        "load_picks": load_picks if cfg.pairs else nothing,
        "weight_registers": lambda: np.full((32, 8 * batch), 0xFFFFFFFF, np.uint32),
        "meta_registers": lambda: np.zeros((32, 2 * batch), np.uint32),
        "pick_registers": lambda: np.full((32, 2 * batch), 0xFFFFFFFF, np.uint32),
    }


def slab_picks(picks_gmem: np.ndarray, slab: int, rows: int, runs: int, gated: bool) -> tuple[np.ndarray, np.ndarray]:
    """The picks ``(32, runs)`` of each lane's two packed rows in a slab of 16; beyond the last row, anybody's."""
    if picks_gmem.shape != (rows, runs):
        raise KernelError(f"picks: there are {picks_gmem.shape}, the kernel says {(rows, runs)}")
    if gated:
        low = np.minimum(slab * 8 + LANE // 4, rows // 2 - 1)
        return picks_gmem[low], picks_gmem[low + rows // 2]
    low = np.minimum(slab * 16 + LANE // 4, rows - 1)
    return picks_gmem[low], picks_gmem[np.minimum(low + 8, rows - 1)]


def _place_words(cfg: Any) -> Words:
    def place(tokens: int) -> tuple[int, int]:
        slab, token_tile = divmod(number(), -(-tokens // cfg.tile_t))
        return slab, token_tile * cfg.tile_t

    def picks(picks_gmem: np.ndarray, slab: int, rows: int, runs: int) -> Any:
        return slab_picks(picks_gmem, slab, (rows + 1) // 2, runs, gated=False)

    return {"place": place, "picks": picks if cfg.pairs else nothing}


def _token_words(cfg: Any) -> Words:
    def load_tokens(x_gmem: np.ndarray, first: int, block: int, tokens: int, columns: int, x_pitch: int) -> None:
        if x_gmem.strides[0] != 2 * x_pitch:
            raise KernelError(f"load_tokens: rows are {x_gmem.strides[0]} bytes apart, the kernel says {2 * x_pitch}")
        copy_tokens(cfg, x_gmem[first : min(first + cfg.tile_t, tokens), :columns], block)

    return {"load_tokens": load_tokens, "wait_tokens": wait_tokens}


def copy_tokens(cfg: Any, rows: np.ndarray, block: int) -> None:
    """Blocks from ``block`` on of ``rows`` on their way to the running warp's memory, which is poisoned; zeros beyond
    the last column."""
    cta, warp = _here.cta, _here.warp
    padded = np.zeros((len(rows), (block + cfg.batch) * BLOCK), np.uint16)
    padded[:, : rows.shape[1]] = rows.view(np.uint16)[:, : padded.shape[1]]
    found, place = padded[:, block * BLOCK :].reshape(-1, cfg.batch, BLOCK), cta.tokens[warp]
    place[:] = NOBODY
    cta.shared[warp] = np.nan  # has no place of its own
    cta.copies[warp].append(lambda: np.copyto(place[:, : len(rows)], found.swapaxes(0, 1)))


def wait_tokens() -> None:
    """Until the running warp's copies have landed."""
    copies = _here.cta.copies[_here.warp]
    while copies:
        copies.pop(0)()


def check_landed(word: str) -> None:
    """Raise if copies of the running warp are under way."""
    if _here.cta.copies[_here.warp]:
        raise KernelError(f"{word} needs the place of tokens that are still on their way; say wait_tokens()")


def tokens_of(i: int, group: int) -> np.ndarray:
    """Registers ``(32, 8)`` of B for the eight tokens of ``group``, from block ``i`` of the running warp's memory."""
    check_landed("mma_sp")
    pairs = _here.cta.tokens[_here.warp, i, 8 * group : 8 * group + 8].view(np.uint32)  # of columns
    return pairs[LANE[:, None] // 4, LANE[:, None] % 4 + 4 * np.arange(8)]


def sum_words(cfg: Any) -> Words:
    """Products of a warp and their sums: of Samoyeds those of a block, of the even and of the odd rows."""
    batch, groups, pairs = cfg.batch, cfg.tile_t // 8, cfg.pairs
    sums = 4 * groups  # of a set
    first = sums if pairs else 0  # of those that are outputs

    def mma_sp(acc: Any, a: Any, e: Any, odd: Any) -> None:
        for i in range(batch):
            for group in range(groups):
                b = tokens_of(i, group)
                mine = slice(4 * group, 4 * group + 4)
                if pairs:
                    acc[:, mine] = 0
                for step in range(2):
                    values = a[:, 8 * i + 4 * step :][:, :4]
                    acc[:, mine] += _product(values, e[:, 2 * i + step], b[:, 4 * step :][:, :4], cfg.dtype)
                if pairs:
                    is_odd = odd[:, [2 * i, 2 * i, 2 * i + 1, 2 * i + 1]] != 0
                    to_even, to_odd = (acc[:, sums * half :][:, mine] for half in (1, 2))
                    to_even[~is_odd] += acc[:, mine][~is_odd]
                    to_odd[is_odd] += acc[:, mine][is_odd]

    def share(acc: Any) -> None:
        check_landed("share")
        _here.cta.tokens[_here.warp] = NOBODY  # the sums come in their place
        for half in range(cfg.sets):
            for register in range(sums):
                row, token = fragments.mma_sp_d(LANE, register % 4)
                mine = acc[:, first + half * sums + register]
                _here.cta.shared[_here.warp, half, register // 4 * 8 + token, row] = mine

    def zero(acc: Any) -> None:
        acc[:] = 0

    return {
        "accumulator": lambda: np.full((32, first + cfg.sets * sums), np.nan, np.float32),
        "zero": zero,
        "mma_sp": mma_sp,
        "share": share,
        "barrier": lambda: _here.cta.barrier(_here.warp),
    }


def total(half: int, token: int, row: int) -> np.float32:
    """The sum of all warps, in their order."""
    return functools.reduce(np.add, _here.cta.shared[:, half, token, row], np.float32(0))


def outputs_of(cfg: Any) -> Iterator[tuple[int, int]]:
    """``(token, output)`` that the running warp stores."""
    for first in range(32 * _here.warp, cfg.outputs * cfg.tile_t, cfg.threads):
        for index in range(first, first + 32):
            yield divmod(index, cfg.outputs)


def check_pitch(y_gmem: np.ndarray, y_pitch: int) -> None:
    """Raise unless rows of Y are as far apart as the kernel says."""
    if y_gmem.strides[0] != 2 * y_pitch:
        raise KernelError(f"store: rows are {y_gmem.strides[0]} bytes apart, the kernel says {2 * y_pitch}")


def _store_words(cfg: Any) -> Words:
    def store(y_gmem: np.ndarray, bias_gmem: Any, slab: int, first: int, rows: int, tokens: int, y_pitch: int) -> None:
        check_pitch(y_gmem, y_pitch)
        for token, output in outputs_of(cfg):
            row = slab * cfg.outputs + output
            if first + token < tokens and row < rows:
                value = total(output % cfg.sets, token, output // cfg.sets)
                y_gmem[first + token, row] = value + (np.float32(bias_gmem[row]) if cfg.bias else np.float32(0))

    return {"store": store}


def _halves(registers: np.ndarray, dtype: str) -> np.ndarray:
    """``(32, n)`` registers as ``(32, n, 2)`` float32."""
    raw = np.ascontiguousarray(registers)
    if dtype == "f16":
        return raw.view(np.float16).astype(np.float32).reshape(32, -1, 2)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(32, -1, 2)


def _product(a: np.ndarray, e: np.ndarray, b: np.ndarray, dtype: str) -> np.ndarray:
    """One ``mma.sp.m16n8k32``: registers of A, metadata and B to the ``(32, 4)`` sums of its result."""
    stored, dense_b = np.empty((16, 16), np.float32), np.empty((32, 8), np.float32)
    halves_a, halves_b, words = _halves(a, dtype), _halves(b, dtype), np.empty((16, 2), np.uint16)
    for register in range(4):
        for half in range(2):
            stored[fragments.mma_sp_a(LANE, register, half)] = halves_a[:, register, half]
            dense_b[fragments.mma_sp_b(LANE, register, half)] = halves_b[:, register, half]
    for half in range(2):
        words[fragments.mma_sp_meta(READ, half)] = e[READ] >> 16 * half & 0xFFFF
    positions = metadata.unpack(words)
    stored[~np.repeat(positions[..., 0] < positions[..., 1], 2, axis=1)] = np.nan  # undefined on the hardware
    columns = (4 * np.arange(8)[:, None] + positions).reshape(16, 16)
    with np.errstate(invalid="ignore", over="ignore"):
        d = np.einsum("ms,msn->mn", stored, dense_b[columns])
    return np.stack([d[fragments.mma_sp_d(LANE, register)] for register in range(4)], axis=1)


def launch(
    make_kernel: Callable[[Any, Any], Callable[..., None]],
    cfg: Any,
    ctas: int,
    arguments: Sequence[Any],
    seed: int = 0,
    make: Callable[[Any], SimpleNamespace] = make,
) -> None:
    """Run ``make_kernel(tile, cfg)(*arguments)`` on ``ctas`` CTAs, one after the other; arrays instead of addresses."""
    kernel = make_kernel(make(cfg), cfg)
    for number in range(ctas):
        crew = Crew(seed + number)
        cta = _Cta(cfg, number, crew)

        def live(warp: int, cta: _Cta = cta) -> None:
            _here.warp, _here.cta = warp, cta
            kernel(*arguments)

        crew.run({f"warp {warp}": functools.partial(live, warp) for warp in range(cfg.warps)})
