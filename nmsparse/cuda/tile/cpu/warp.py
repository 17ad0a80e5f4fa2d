"""The NumPy twin of :mod:`~nmsparse.cuda.tile.gpu.warp`: each word one equation, on all threads of a CTA at once.

An asynchronous copy poisons its target with NaNs when it is issued and lands only when a wait says so; stores to shared
memory land at the next barrier. A forgotten commit or wait, or a slot that is refilled too early, shows as NaN. CTAs
run one after another, the last first, so that partial sums are there when their owner adds them. What the twin cannot
show: races between warps, bank conflicts, time.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from ....formats import fragments
from ... import schedule
from ...config_mma import metadata_place, metadata_word, token_place, value_row, weights_place
from ...layout import BLOCK, BLOCK_BYTES
from .elements import DTYPES, Memory

__all__ = ["run"]

POISON = 0xFF  # twice: a NaN of both formats

Words = dict[str, Callable[..., Any]]


def run(make_kernel: Any, cfg: Any, workers: int, *arguments: Any) -> None:
    """Launch a kernel text on ``workers`` CTAs; arrays among the arguments are its memory."""
    given = [Memory(a) if isinstance(a, np.ndarray) else a for a in arguments]
    for worker in reversed(range(workers)):
        make_kernel(make(cfg, worker, workers), cfg)(*given)


def make(cfg: Any, worker: int, workers: int) -> SimpleNamespace:
    """The words for ``cfg`` in CTA ``worker``."""
    shared = Shared(cfg)
    parts = _place_words(cfg, worker, workers), _load_words(cfg, shared), _product_words(cfg, shared), _run_words(cfg)
    words: Words = {}
    for part in (*parts, _partial_words(cfg, worker), _store_words(cfg)):
        words |= part
    return SimpleNamespace(**words)


class Shared:
    """Shared memory of a CTA: its bytes, and the copies that are on their way there."""

    def __init__(self, cfg: Any):
        self.bytes = np.full(cfg.shared_bytes, POISON, np.uint8)
        self.groups: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self.open: list[tuple[np.ndarray, np.ndarray]] = []
        self.stores: list[tuple[np.ndarray, np.ndarray]] = []

    def copy(self, places: np.ndarray, data: np.ndarray) -> None:
        self.bytes[places] = POISON
        self.open.append((places, data))

    def store(self, places: np.ndarray, data: np.ndarray) -> None:
        self.bytes[places] = POISON
        self.stores.append((places, data))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, groups: int) -> None:
        """Until ``groups`` groups are under way, and a barrier."""
        landed = self.stores
        while len(self.groups) > groups:
            landed += self.groups.pop(0)
        for places, data in landed:
            self.bytes[places] = data
        self.stores = []

    def words(self, at: np.ndarray, kind: type, count: int) -> np.ndarray:
        """``count`` numbers from each address of ``at``."""
        size = np.dtype(kind).itemsize * count
        return self.bytes[np.asarray(at)[..., None] + np.arange(size)].view(kind)

    def ldmatrix(self, at: np.ndarray) -> np.ndarray:
        """Threads × 4 registers × 2 halves; lane 8i + r of each warp gives the address of row r of matrix i."""
        thread, reg = np.ogrid[: len(at), :4]
        source = at[thread // 32 * 32 + reg * 8 + thread % 32 // 4]
        return self.words(source + thread % 4 * 4, np.uint16, 2)


def _place_words(cfg: Any, worker: int, workers: int) -> Words:
    def grid(rows, tokens, k_blocks):
        return -(-rows // cfg.tile_m), -(-tokens // cfg.tile_t), k_blocks * BLOCK // cfg.tile_k

    def piece(index, tiles, split, parts, steps):
        return schedule.piece(index, worker, workers, tiles, split, parts, steps)

    return {
        "ring": lambda: 0,
        "grid": grid,
        "pieces": lambda tiles, split, parts: schedule.pieces(worker, workers, tiles, split, parts),
        "piece": piece,
        "place": lambda number, row_tiles, token_tiles: schedule.place(number, row_tiles, token_tiles, cfg.group),
        "run_of": schedule.run_of,
    }


def _load_words(cfg: Any, shared: Shared) -> Words:
    def slot(ring, step):
        return ring + step % cfg.stages * cfg.slot_bytes

    def load_weights(ring, step, w_gmem, row, rows, k_blocks):
        blocks = cfg.tile_rows // BLOCK
        i, byte = np.ogrid[:blocks, : cfg.weight_bytes]
        line = np.minimum(row * blocks + i, (rows - 1) // cfg.height)
        source = (line * k_blocks + step * (cfg.tile_k // BLOCK)) * BLOCK_BYTES + byte
        data = w_gmem.load(source.ravel(), 1, np.ones(source.size, bool)).reshape(source.shape)
        shared.copy(slot(ring, step) + cfg.token_bytes + i * cfg.weight_bytes + byte, data)

    def tokens_of(load, ring, step, x_gmem, token, tokens, column, columns, pitch):
        """X[token, column] for the tokens that exist; zeros in columns that do not."""
        t = np.arange(min(cfg.tile_t, tokens - token * cfg.tile_t))[:, None]
        at = ((token * cfg.tile_t + t) * pitch + column) * 2
        data = x_gmem.load(at.ravel(), 2, np.broadcast_to(column < columns, at.shape).ravel())
        k = np.arange(cfg.tile_k)
        place = slot(ring, step) + token_place(t, k // 8, cfg.tile_t) + k % 8 * 2
        load(place[..., None] + np.arange(2), data.reshape(*at.shape, 2))

    def load_tokens(ring, step, x_gmem, index_gmem, row, token, tokens, columns, pitch):
        assert pitch % 8 == 0 or not cfg.vector, f"cp.async of 16 bytes from tokens with a pitch of {pitch} elements"
        column = step * cfg.tile_k + np.arange(cfg.tile_k)
        load = shared.copy if cfg.vector else shared.store
        tokens_of(load, ring, step, x_gmem, token, tokens, column, columns, pitch)

    def load_tokens_gathered(ring, step, x_gmem, index_gmem, row, token, tokens, columns, pitch):
        v, m = cfg.gather
        group, kept = np.divmod(step * cfg.tile_k + np.arange(cfg.tile_k), 4)
        groups = -(-columns // (4 * m)) * 4
        at = (row * cfg.tile_m // v * groups + group) * 4 + kept
        column = m * group + index_gmem.load(at, 1, group < groups)[:, 0]
        tokens_of(shared.store, ring, step, x_gmem, token, tokens, column, columns, pitch)

    return {
        "load_weights": load_weights,
        "load_tokens": load_tokens,
        "load_tokens_gathered": load_tokens_gathered,
        "commit": shared.commit,
        "wait": lambda: shared.wait(cfg.stages - 2),
    }


def _product_words(cfg: Any, shared: Shared) -> Words:
    (high, wide), dtype = cfg.atoms, DTYPES[cfg.dtype]
    thread = np.arange(cfg.threads)
    warp, lane = thread // 32, thread % 32
    row, token = warp // cfg.warps_t * 16 * high, warp % cfg.warps_t * 8 * wide

    def operand_a(at):
        """Warps × 16 rows × 16 stored columns."""
        matrix = np.empty((cfg.warps, 16, 16), dtype)
        where = fragments.mma_sp_a(*np.ix_(lane, range(4), range(2)))
        matrix[(warp[:, None, None], *where)] = shared.ldmatrix(at).view(dtype)
        return matrix.astype(np.float32)

    def operand_b(at):
        """Warps × 32 columns × 8 tokens."""
        matrix = np.empty((cfg.warps, 32, 8), dtype)
        where = fragments.mma_sp_b(*np.ix_(lane, range(4), range(2)))
        matrix[(warp[:, None, None], *where)] = shared.ldmatrix(at).view(dtype)
        return matrix.astype(np.float32)

    def positions(at, selector):
        """Warps × 16 rows × 16 stored columns: the dense column that each stored one stands for."""
        words = np.empty((cfg.warps, 16, 2), np.uint16)
        read = np.isin(lane, fragments.meta_lanes(selector))
        where = fragments.mma_sp_meta(lane[read][:, None], np.arange(2))
        words[(warp[read][:, None], *where)] = shared.words(at[read], np.uint16, 2)
        stored = np.arange(16)
        return words[..., stored // 8] >> stored % 8 * 2 & 3 | stored // 2 * 4

    def mma_sp(acc, ring, step):
        slot = ring + step % cfg.stages * cfg.slot_bytes
        weights, across = slot + cfg.token_bytes, np.arange(cfg.warps)[:, None, None]
        values = weights + weights_place(row, cfg.weight_bytes) + value_row(lane)
        words = weights + metadata_place(row, cfg.weight_bytes) + metadata_word(lane)
        for block in range(cfg.tile_k // BLOCK):
            for half in range(2):
                at = slot + token_place(token + lane % 8, lane // 8 + 8 * block + 4 * half, cfg.tile_t)
                b = [operand_b(at + 1024 * j) for j in range(wide)]
                for i in range(high):
                    below = weights_place(16 * i, cfg.weight_bytes) + block * BLOCK_BYTES
                    a = operand_a(values + below + 256 * half)
                    meta = metadata_place(16 * i, cfg.weight_bytes) - metadata_place(0, cfg.weight_bytes)
                    column = positions(words + meta + block * BLOCK_BYTES, selector=half)
                    for j in range(wide):
                        product = np.einsum("wrk,wrkt->wrt", a, b[j][across, column])
                        reg = np.arange(4)
                        where = fragments.mma_sp_d(lane[:, None], reg)
                        acc[:, 4 * (i * wide + j) + reg] += product[(warp[:, None], *where)]  # of a run

    def zero(acc):
        acc[:] = 0

    return {
        "accumulator": lambda: np.full((cfg.threads, cfg.sums), np.nan, np.float32),
        "zero": zero,
        "mma_sp": mma_sp,
    }


def _run_words(cfg: Any) -> Words:
    """Sums of a run, and what becomes of them; weights other than Samoyeds have nothing to say here."""
    thread, sum_ = np.ogrid[: cfg.threads, : cfg.run_sums]
    packed_row, sums = _places(cfg, thread, sum_)[0], cfg.run_sums

    def picks(index_gmem, row, rows, runs):
        mine = np.minimum(row * cfg.tile_rows + packed_row, (rows - 1) // 2)
        return index_gmem, np.broadcast_to(mine, (cfg.threads, sums)) * runs

    def pick(picks, run):
        index_gmem, first = picks
        at = (first + run).ravel()
        return index_gmem.load(at, 1, np.ones(at.size, bool)).reshape(first.shape) != 0

    def add_run(acc, odd):
        for half, mine in ((1, ~odd), (2, odd)):
            acc[:, half * sums : (half + 1) * sums][mine] += acc[:, :sums][mine]
        acc[:, :sums] = 0

    if cfg.pairs:
        return {"picks": picks, "pick": pick, "add_run": add_run}
    return dict.fromkeys(("picks", "pick", "add_run"), lambda *args: 0)


def _places(cfg: Any, thread: Any, sum_: Any) -> tuple[Any, Any]:
    """Packed row and token in the tile of a thread's sum, of one set."""
    (high, wide), warp, atom = cfg.atoms, thread // 32, sum_ // 4
    row, token = fragments.mma_sp_d(thread % 32, sum_ % 4)
    return (
        16 * (warp // cfg.warps_t * high + atom // wide) + row,
        8 * (warp % cfg.warps_t * wide + atom % wide) + token,
    )


def _partial_words(cfg: Any, worker: int) -> Words:
    kept = slice(*cfg.kept)

    def store_partial(acc, partial_gmem, flag_gmem):
        acc = acc[:, kept]
        partial_gmem.bytes.view(np.float32).reshape(-1, *acc.shape)[worker] = acc
        flag_gmem.bytes.view(np.uint32)[worker] = 1

    def add_partials(acc, partial_gmem, flag_gmem, split, parts):
        flags, acc = flag_gmem.bytes.view(np.uint32), acc[:, kept]
        for part in range(1, parts):
            peer = worker + part * split
            assert flags[peer] == 1, f"CTA {worker} waits for partial sums that CTA {peer} has not stored"
            flags[peer] = 0
            acc += partial_gmem.bytes.view(np.float32).reshape(-1, *acc.shape)[peer]

    return {"store_partial": store_partial, "add_partials": add_partials}


def _store_words(cfg: Any) -> Words:
    dtype, (first, last), sets = DTYPES[cfg.dtype], cfg.kept, 2 if cfg.pairs else 1

    def store(acc, ring, y_gmem, bias_gmem, row, token, rows, tokens, pitch):
        thread, sum_ = np.ogrid[: cfg.threads, : last - first]
        packed_row, t = _places(cfg, thread, sum_ % cfg.run_sums)
        m, t = row * cfg.tile_m + packed_row * sets + sum_ // cfg.run_sums, token * cfg.tile_t + t
        inside, acc = ((m < rows) & (t < tokens)).ravel(), acc[:, first:last]
        if cfg.bias:
            acc = acc + bias_gmem.load((m + 0 * t).ravel() * 2, 2, inside).view(dtype).reshape(acc.shape).astype(
                np.float32
            )
        y_gmem.store(((t * pitch + m) * 2).ravel(), acc.astype(dtype).reshape(-1, 1), inside)

    return {"store": store}
