"""The words of places, of the ring and of the products, on NumPy. Each gets the role that says it first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ....formats.fragments import WARPGROUP, swizzle_128b
from ... import schedule
from ...layout import BLOCK, BLOCK_BYTES
from .machine import PRODUCER, Accumulator, Group, Ring, Role
from .multiply import CHUNK_BYTES, add_to_registers, metadata_registers, sparse_product

__all__ = [
    "begin",
    "box_of",
    "check_settled",
    "consumer_words",
    "place_words",
    "producer_words",
    "ring_words",
    "slot_to_multiply",
    "sparse_word",
]

Words = dict[str, Callable[..., Any]]
DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
ROW_BYTES = 2 * BLOCK  # of a token in a slot: the span of the 128-byte swizzle


def fill_and_slot(cfg: Any, role: Role, turn: int) -> tuple[int, int]:
    """Which fill of which slot ``turn`` is."""
    role.require(turn >= 0, f"turn {turn}: expected 0 or more")
    return divmod(turn, cfg.stages)


def place_words(cfg: Any) -> Words:
    """Which part of the product a role works on."""

    def worker(role: Role) -> tuple[int, int]:
        return role.cta.number, role.cta.machine.workers

    def grid(role: Role, rows: int, tokens: int, k_blocks: int) -> tuple[int, int, int]:
        return -(-rows // cfg.tile_m), -(-tokens // cfg.tile_t), k_blocks * BLOCK // cfg.tile_k

    def cluster(role: Role, split: int, parts: int) -> int:
        return schedule.cluster_of(bool(cfg.clusters), split, parts)

    def pieces(role: Role, tiles: int, split: int, parts: int) -> int:
        return 1 if cluster(role, split, parts) > 1 else schedule.pieces(*worker(role), tiles, split, parts)

    def piece(role: Role, index: int, tiles: int, split: int, parts: int, steps: int) -> tuple[int, int, int]:
        if cluster(role, split, parts) > 1:
            return schedule.part_of(role.cta.number, parts, steps)
        return schedule.piece(index, *worker(role), tiles, split, parts, steps)

    def place(role: Role, number: int, row_tiles: int, token_tiles: int) -> tuple[int, int]:
        return schedule.place(number, row_tiles, token_tiles, cfg.group)

    return {
        "grid": grid,
        "cluster": cluster,
        "pieces": pieces,
        "piece": piece,
        "place": place,
        "role": lambda role: role.number,
        "elect": lambda role: True,
    }


def ring_words(cfg: Any) -> Words:
    """From the start of a CTA to its end: the ring's barriers exist when all roles have met."""

    def ring(role: Role) -> Ring:
        if role.number == PRODUCER:
            for full, empty in zip(role.cta.ring.full, role.cta.ring.empty, strict=True):
                full.init(cfg.fillers)
                empty.init(WARPGROUP * cfg.warpgroups)
        role.meet()
        return role.cta.ring

    return {"prefetch": lambda role, x_gmem: None, "ring": ring}


def begin(cfg: Any, role: Role, turn: int) -> int:
    """The slot of ``turn``, once nobody can be reading it."""
    cta, (fill, slot) = role.cta, fill_and_slot(cfg, role, turn)
    where = f"slot {slot} of CTA {cta.number} (turn {turn})"
    role.require(not cta.ring.taken, f"fills {where}, where sums of other CTAs are")
    known = role.knows(role.cta.ring.empty[slot], fill)
    role.require(known, f"fills {where} without having waited until it was empty; say wait_empty(ring, {turn})")
    for consumer in cta.roles[1:]:
        role.require(consumer.released[slot] >= fill, f"fills {where} before {consumer} has released it")
    full = cta.ring.full[slot]
    role.require(
        full.phase == fill,
        f"more bytes for {where} after its phase is complete: expect() announced too few, or named another turn",
    )
    cta.ring.begin(slot, fill)
    return slot


def producer_words(cfg: Any) -> Words:
    """What fills the ring."""
    blocks, step_blocks = cfg.warpgroups * cfg.blocks, cfg.tile_k // BLOCK

    def present(row: int, rows: int) -> int:
        return min(max(-(-rows // cfg.height) - row * blocks, 0), blocks)

    def wait_empty(role: Role, ring: Ring, turn: int) -> None:
        fill, slot = fill_and_slot(cfg, role, turn)
        role.wait(ring.empty[slot], ~fill & 1, turn)

    def expect(role: Role, ring: Ring, turn: int, row: int, rows: int) -> None:
        slot = begin(cfg, role, turn)
        ring.full[slot].arrive(str(role), expect=cfg.token_bytes + present(row, rows) * cfg.weight_bytes)

    def load_tokens(role: Role, ring: Ring, turn: int, x_gmem: np.ndarray, token: int, step: int) -> None:
        row, chunk = np.arange(cfg.tile_t)[:, None], np.arange(ROW_BYTES // CHUNK_BYTES)
        for j in range(step_blocks):
            slot = begin(cfg, role, turn)
            box = box_of(x_gmem, token * cfg.tile_t, (step * step_blocks + j) * BLOCK, cfg.tile_t)
            first = j * cfg.tile_t * ROW_BYTES
            target = ring.memory[slot, first : first + cfg.tile_t * ROW_BYTES]
            target = target.reshape(cfg.tile_t, -1, CHUNK_BYTES)

            def land(target: np.ndarray = target, box: np.ndarray = box) -> None:
                target[row, swizzle_128b(row, chunk)] = box

            ring.full[slot].copy(box.nbytes, land)

    def load_weights(
        role: Role, ring: Ring, turn: int, w_gmem: np.ndarray, row: int, step: int, rows: int, k_blocks: int
    ) -> None:
        packed = w_gmem.reshape(-1, BLOCK_BYTES)
        for i in range(present(row, rows)):
            slot = begin(cfg, role, turn)
            first = (row * blocks + i) * k_blocks + step * step_blocks
            inside = first >= 0 and first + step_blocks <= len(packed)
            role.require(inside, f"load_weights: block {first} is not among the {len(packed)} of w_gmem")
            source = packed[first : first + step_blocks].reshape(-1)
            at = cfg.token_bytes + i * cfg.weight_bytes
            target = ring.memory[slot, at : at + cfg.weight_bytes]
            ring.full[slot].copy(source.nbytes, lambda target=target, source=source: np.copyto(target, source))

    return {
        "wait_empty": wait_empty,
        "expect": expect,
        "load_tokens": load_tokens,
        "load_weights": load_weights,
        "give_registers": lambda role: None,
    }


def box_of(x_gmem: np.ndarray, token: int, column: int, share: int) -> np.ndarray:
    """Chunks of ``share`` tokens × 64 columns as a tensor map brings them: zeros outside the tensor."""
    inside = x_gmem[token : token + share, column : column + BLOCK].view(np.uint16)
    box = np.zeros((share, BLOCK), np.uint16)
    box[: inside.shape[0], : inside.shape[1]] = inside
    return box.view(np.uint8).reshape(share, -1, CHUNK_BYTES)


def slot_to_multiply(cfg: Any, role: Role, ring: Ring, turn: int) -> int:
    """The slot of ``turn``, which ``role`` may multiply now."""
    fill, slot = fill_and_slot(cfg, role, turn)
    what = f"multiplies slot {slot} (turn {turn})"
    known = role.knows(ring.full[slot], fill + 1)
    role.require(known, f"{what} without having waited until it was full; say wait_full first")
    role.require(role.released[slot] == fill, f"{what}, which it has already released")
    return slot


def sparse_word(cfg: Any, number: int) -> Callable[..., None]:
    """``wgmma.sp`` of a slot with its first ``number`` tokens, into the first sums."""
    dtype, step_blocks, block_sums = DTYPES[cfg.dtype], cfg.tile_k // BLOCK, cfg.tile_t // 2

    def packed(role: Role, slot: int) -> np.ndarray:
        """The consumer's blocks in a slot, ``(blocks, steps of 64, bytes)``."""
        at = cfg.token_bytes + role.number * cfg.blocks * cfg.weight_bytes
        mine = role.cta.ring.memory[slot, at : at + cfg.blocks * cfg.weight_bytes]
        return mine.reshape(cfg.blocks, step_blocks, BLOCK_BYTES)

    def wgmma_sp(role: Role, acc: Accumulator, ring: Ring, turn: int, before: int) -> None:
        slot = slot_to_multiply(cfg, role, ring, turn)
        tokens = ring.memory[slot, : cfg.token_bytes].reshape(step_blocks, cfg.tile_t, ROW_BYTES)[:, :number]
        blocks = packed(role, slot)
        metadata, registers = metadata_registers(blocks), 0 if cfg.pairs else before % 2
        for group in role.groups:
            clash = group.registers == registers
            role.require(not clash, f"overwrites metadata that the wgmma group of turn {group.turn} may still read")

        def multiply() -> None:
            for i in range(cfg.blocks):
                sums = acc.sums[:, i * block_sums : i * block_sums + number // 2]
                if before == 0:
                    sums[:] = 0
                for j in range(step_blocks):
                    for half in (0, 1):
                        d = sparse_product(tokens[j], blocks[i, j], metadata[i, j, half], half, dtype)
                        add_to_registers(sums, d)

        role.groups.append(Group(acc, slot, turn, multiply, registers))

    return wgmma_sp


def consumer_words(cfg: Any) -> Words:
    """What empties the ring into sums."""

    def accumulator(role: Role) -> Accumulator:
        return Accumulator(np.full((WARPGROUP, cfg.sums), np.nan, np.float32))

    def wait_full(role: Role, ring: Ring, turn: int) -> None:
        fill, slot = fill_and_slot(cfg, role, turn)
        role.wait(ring.full[slot], fill & 1, turn)

    def wait_for_all_but(count: int) -> Callable[[Role], None]:
        return lambda role: role.finish_groups(but=count)

    def release(role: Role, ring: Ring, turn: int) -> None:
        fill, slot = fill_and_slot(cfg, role, turn)
        for group in role.groups:
            reads = group.slot == slot
            role.require(
                not reads, f"releases slot {slot} (turn {turn}) while the wgmma group of turn {group.turn} reads it"
            )
        known = role.knows(ring.full[slot], fill + 1)
        role.require(known, f"releases slot {slot} (turn {turn}) without having waited until it was full")
        done = role.released[slot]
        role.require(done == fill, f"releases fill {fill} of slot {slot} (turn {turn}), but has released {done} so far")
        role.released[slot] += 1
        ring.empty[slot].arrive(str(role), times=WARPGROUP)

    return {
        "accumulator": accumulator,
        "wait_full": wait_full,
        "wgmma_sp": sparse_word(cfg, cfg.tile_t),
        "wait_wgmma": wait_for_all_but(0),
        "wait_wgmma_but_one": wait_for_all_but(1),
        "release": release,
        "take_registers": lambda role: None,
    }


def check_settled(role: Role, acc: Accumulator, word: str) -> None:
    """Raise if a group that adds to ``acc`` is under way."""
    for group in role.groups:
        role.require(
            group.acc is not acc, f"{word} touches sums in flight: the wgmma group of turn {group.turn} adds to them"
        )
