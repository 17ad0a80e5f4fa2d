"""The words of :mod:`nmsparse.cuda.kernels.grouped` on NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from ....formats.fragments import swizzle_128b
from ... import schedule
from ...layout import BLOCK, BLOCK_BYTES
from . import vocabulary
from .grouped_store import store_words
from .machine import Accumulator, Group, Ring, Role
from .multiply import CHUNK_BYTES, add_to_registers, dense_product
from .overlap import overlapping
from .plan import ends_of
from .samoyeds import LOWER, Picks, run_words
from .words import (
    DTYPES,
    ROW_BYTES,
    begin,
    box_of,
    consumer_words,
    place_words,
    producer_words,
    ring_words,
    slot_to_multiply,
    sparse_word,
)

__all__ = ["make"]

Words = dict[str, Callable[..., Any]]
NOWHERE, UNKNOWN = -1, -2  # a token that does not exist; registers that nobody has written


def make(cfg: Any) -> SimpleNamespace:
    """The words for ``cfg``, as the namespace that a kernel text receives."""
    gemm = {**place_words(cfg), **ring_words(cfg), **producer_words(cfg), **consumer_words(cfg)}
    everyone = {word: gemm[word] for word in ("role", "elect", "ring")} | _plan_words(cfg)
    producer = {word: gemm[word] for word in ("give_registers", "wait_empty")} | _weight_words(cfg) | _token_words(cfg)
    waits = "wait_full", "wait_wgmma", "wait_wgmma_but_one"
    consumer = {word: gemm[word] for word in ("take_registers", "accumulator", *waits, "release")}
    product = _dense_word if cfg.dense else sparse_word
    consumer |= {"multiply": product(cfg, cfg.tile_t), "multiply_few": product(cfg, cfg.few)}
    for part in (_run_words, store_words):
        consumer |= part(cfg)
    tile = overlapping(vocabulary(everyone, producer, consumer))
    tile.inline = lambda function: function
    return tile


def _plan_words(cfg: Any) -> Words:
    """Who computes what, as the plan says."""

    def grid(role: Role, row_blocks: int, k_blocks: int) -> tuple[int, int]:
        steps, rest = divmod(k_blocks * BLOCK, cfg.tile_k)
        role.require(not rest, f"grid: expected k_blocks of whole steps of {cfg.tile_k} columns, came {k_blocks}")
        return -(-row_blocks // cfg.warpgroups), steps

    def tiles(role: Role, plan_gmem: np.ndarray, experts: int, row_tiles: int) -> int:
        ends, tile_ends = ends_of(cfg, plan_gmem, experts)
        counts = np.diff(ends)
        whole = (counts >= 0).all() and np.array_equal(tile_ends[1:], np.cumsum(-(-counts // cfg.tile_t)))
        role.require(
            bool(whole),
            f"expected a plan of ends, and of the ends of tiles of {cfg.tile_t} tokens, came {plan_gmem.tolist()}",
        )
        return int(tile_ends[-1]) * row_tiles

    def place(
        role: Role, number: int, row_tiles: int, plan_gmem: np.ndarray, experts: int
    ) -> tuple[int, int, int, int]:
        ends, tile_ends = ends_of(cfg, plan_gmem, experts)
        expert = sum(end * row_tiles <= number for end in tile_ends[1:])
        role.require(expert < experts, f"place: tile {number} belongs to no expert")
        before, after = tile_ends[expert : expert + 2]
        row, token = schedule.place(number - before * row_tiles, row_tiles, after - before, cfg.group)
        return expert, row, ends[expert] + token * cfg.tile_t, ends[expert + 1]

    def share(role: Role, tiles: int) -> int:
        return schedule.share(role.cta.number, role.cta.machine.workers, tiles)

    def nth(role: Role, index: int) -> int:
        return schedule.nth(index, role.cta.number, role.cta.machine.workers)

    return {
        "grid": grid,
        "tiles": tiles,
        "place": place,
        "share": share,
        "nth": nth,
    }


def _weight_words(cfg: Any) -> Words:
    counted = 0 if cfg.gather else cfg.token_bytes  # tokens that the copy engine brings
    step_blocks = cfg.tile_k // BLOCK

    def fill(role: Role, ring: Ring, turn: int, parts: list[np.ndarray]) -> None:
        """Announce and copy ``parts``, which follow each other in the slot."""
        slot = begin(cfg, role, turn)
        ring.full[slot].arrive(str(role), expect=counted + sum(part.nbytes for part in parts))
        at = cfg.token_bytes
        for part in parts:
            target = ring.memory[slot, at : at + part.nbytes]
            ring.full[slot].copy(part.nbytes, functools.partial(np.copyto, target, part))
            at += part.nbytes

    def load_packed(
        role: Role,
        ring: Ring,
        turn: int,
        w_gmem: np.ndarray,
        expert: int,
        row: int,
        step: int,
        row_blocks: int,
        k_blocks: int,
    ) -> None:
        packed, parts = w_gmem.reshape(-1, BLOCK_BYTES), []
        for block in range(row * cfg.warpgroups, min((row + 1) * cfg.warpgroups, row_blocks)):
            first = (expert * row_blocks + block) * k_blocks + step * step_blocks
            inside = first >= 0 and first + step_blocks <= len(packed)
            role.require(inside, f"load_weights: block {first} is not among the {len(packed)} of w_gmem")
            parts.append(packed[first : first + step_blocks].reshape(-1))
        fill(role, ring, turn, parts)

    def load_dense(
        role: Role,
        ring: Ring,
        turn: int,
        w_gmem: np.ndarray,
        expert: int,
        row: int,
        step: int,
        row_blocks: int,
        k_blocks: int,
    ) -> None:
        eights = cfg.tile_rows // (16 if cfg.gated else 8)
        mine = w_gmem[expert, row * eights : (row + 1) * eights]  # (eights, gate and up, 8, columns)
        rows = mine.reshape(-1, mine.shape[-1])
        boxes = [box_of(rows, 0, (step * step_blocks + j) * BLOCK, cfg.tile_rows) for j in range(step_blocks)]
        fill(role, ring, turn, [_swizzled(box) for box in boxes])

    return {"load_weights": load_dense if cfg.dense else load_packed}


def _swizzled(box: np.ndarray) -> np.ndarray:
    """Bytes of a ``box`` of rows of eight chunks under the 128-byte swizzle."""
    row, swizzled = np.arange(len(box))[:, None], np.empty_like(box)
    swizzled[row, swizzle_128b(row, np.arange(ROW_BYTES // CHUNK_BYTES))] = box
    return swizzled.reshape(-1)


def _token_words(cfg: Any) -> Words:
    step_blocks = cfg.tile_k // BLOCK

    def find_gathered(
        role: Role, tokens: np.ndarray, rows_gmem: np.ndarray, first: int, end: int, x_pitch: int
    ) -> None:
        role.require(x_pitch % 8 == 0, f"gathers chunks of 16 bytes: expected x_pitch in eights, came {x_pitch}")
        role.require(
            first >= 0 and end <= len(rows_gmem), f"find_tokens: positions {first}..{end} are not in rows_gmem"
        )
        mine = rows_gmem[first : min(end, first + cfg.tile_t)].astype(np.int64)
        tokens[:] = NOWHERE
        tokens[: len(mine)] = mine * x_pitch

    def find_in_order(
        role: Role, tokens: np.ndarray, rows_gmem: np.ndarray, first: int, end: int, x_pitch: int
    ) -> None:
        tokens[0] = first

    def known(role: Role, tokens: np.ndarray) -> None:
        role.require(bool((tokens != UNKNOWN).all()), "loads tokens that it has not found; say find_tokens first")

    def gather(
        role: Role, ring: Ring, turn: int, x_gmem: np.ndarray, tokens: np.ndarray, step: int, columns: int
    ) -> None:
        known(role, tokens)
        x = x_gmem.reshape(-1)
        for start in tokens[tokens != NOWHERE]:
            inside = start >= 0 and start + columns <= x.size
            role.require(bool(inside), f"gathers columns from element {start} of X, which has {x.size}")
        slot = begin(cfg, role, turn)
        column = step * cfg.tile_k + np.arange(cfg.tile_k)
        inside = (tokens != NOWHERE)[:, None] & (column // 8 * 8 < columns)  # chunks are copied whole
        box = np.where(inside, x.view(np.uint16)[np.where(inside, tokens[:, None] + column, 0)], 0).astype(np.uint16)
        parts = np.split(box.view(np.uint8).reshape(cfg.tile_t, -1, CHUNK_BYTES), step_blocks, axis=1)
        target = ring.memory[slot, : cfg.token_bytes].reshape(step_blocks, cfg.tile_t, ROW_BYTES)
        swizzled = np.stack([_swizzled(part).reshape(cfg.tile_t, ROW_BYTES) for part in parts])
        there = (tokens != NOWHERE)[:, None]
        # Threads copy: nobody counts these bytes.
        ring.full[slot].copy(0, lambda: np.copyto(target, swizzled, where=there))
        ring.full[slot].arrive(f"the threads of {role}", times=128)

    def load_in_order(
        role: Role, ring: Ring, turn: int, x_gmem: np.ndarray, tokens: np.ndarray, step: int, columns: int
    ) -> None:
        known(role, tokens)
        slot = begin(cfg, role, turn)
        for j in range(step_blocks):
            box = _swizzled(box_of(x_gmem, int(tokens[0]), (step * step_blocks + j) * BLOCK, cfg.tile_t))
            target = ring.memory[slot, j * box.nbytes : (j + 1) * box.nbytes]
            ring.full[slot].copy(box.nbytes, functools.partial(np.copyto, target, box))

    return {
        "token_registers": lambda role: np.full(cfg.tile_t if cfg.gather else 1, UNKNOWN, np.int64),
        "find_tokens": find_gathered if cfg.gather else find_in_order,
        "load_tokens": gather if cfg.gather else load_in_order,
    }


def _dense_word(cfg: Any, number: int) -> Callable[..., Any]:
    """``wgmma`` of a slot with its first ``number`` tokens, into the first sums."""
    dtype, step_blocks = DTYPES[cfg.dtype], cfg.tile_k // BLOCK

    def multiply(role: Role, acc: Accumulator, ring: Ring, turn: int, before: int) -> None:
        slot = slot_to_multiply(cfg, role, ring, turn)
        tokens = ring.memory[slot, : cfg.token_bytes].reshape(step_blocks, cfg.tile_t, ROW_BYTES)[:, :number]
        weights = ring.memory[slot, cfg.token_bytes : cfg.token_bytes + cfg.warpgroups * cfg.weight_bytes]
        mine = weights.reshape(step_blocks, cfg.warpgroups, BLOCK, ROW_BYTES)[:, role.number]

        def product() -> None:
            sums = acc.sums[:, : number // 2]
            if before == 0:
                sums[:] = 0
            for j in range(step_blocks):
                add_to_registers(sums, dense_product(tokens[j], mine[j], dtype))

        role.groups.append(Group(acc, slot, turn, product))

    return multiply


def _run_words(cfg: Any) -> Words:
    def picks(role: Role, picks_gmem: np.ndarray, expert: int, row: int, rows: int, runs: int) -> Picks:
        mine = row * cfg.tile_rows + role.number * BLOCK + LOWER
        if cfg.gated:
            low = np.minimum(mine // 16 * 8 + mine % 8, rows // 2 - 1)
            high = low + rows // 2
        else:
            low, high = np.minimum(mine, rows - 1), np.minimum(mine + 8, rows - 1)
        role.require(expert < len(picks_gmem), f"picks of expert {expert}: there are {len(picks_gmem)}")
        return Picks(picks_gmem[expert].reshape(-1, runs), (low, high)).check(role)

    def nothing(role: Role, *args: Any) -> None:
        return None

    if cfg.pairs:
        return run_words(cfg) | {"picks": picks}
    return dict.fromkeys(("zero", "picks", "pick", "end_run", "end_runs"), nothing)
