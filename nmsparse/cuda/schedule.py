"""Which part of the product each CTA computes: whole tiles, then *split-K* for the tiles that do not fill a wave.

A launch has ``tiles = row_tiles · token_tiles`` tiles of ``steps`` steps of k each and ``workers`` CTAs that all run at
once. All but the last ``split`` tiles are dealt out whole. Each of the last ones is cut along k into
``parts`` equal parts, one for each of ``split · parts`` workers; the worker with the first part owns the tile and adds
the sums of the others in the order of k: the same order in every run.

Or each tile has a cluster of CTAs for itself, which share its steps and add up through their shared memory: for few
tokens, whose tiles do not fill the GPU (:func:`part_of`).

Workers with the same part walk through the same k at the same time. That matters more than an even load: what one
reads, the L2 cache hands to all, while runs that begin anywhere (stream-K, Osama et al. 2023) were fed at two thirds
of the rate on an H200 (benchmarks/LOG.md).

Plain functions of non-negative integers: Numba compiles them for the GPU (:mod:`~nmsparse.cuda.tile.gpu` gives
``divide`` an instruction), the CPU twin and the tests call them as they are.
"""

from __future__ import annotations

__all__ = [
    "banded",
    "cluster_of",
    "divide",
    "first_warp",
    "nth",
    "owner_of",
    "part_of",
    "piece",
    "pieces",
    "place",
    "run_of",
    "share",
    "whole_tiles",
]

SHIFT = 37  # a prime


def divide(a, b):
    """``⌊a / b⌋``. On the GPU one 32-bit instruction: a 64-bit division is a call, and wgmma waits at every call.

    >>> divide(7, 2)
    3
    """
    return a // b


def cluster_of(shares, split, parts):
    """How many CTAs, which form a cluster, have each tile: ``parts`` where no tile is split, of a kernel that shares.

    >>> cluster_of(True, 0, 4), cluster_of(True, 2, 4), cluster_of(False, 0, 4)
    (4, 1, 1)
    """
    return parts if shares and split == 0 else 1


def whole_tiles(worker, workers, tiles, split):
    """How many whole tiles ``worker`` has.

    >>> [whole_tiles(w, 4, 10, 1) for w in range(4)]
    [3, 2, 2, 2]
    """
    whole = tiles - split
    if whole <= workers:  # most products of few tokens, whose first copy would wait for the division
        return 1 if worker < whole else 0
    return divide(whole + workers - 1 - worker, workers)


def pieces(worker, workers, tiles, split, parts):
    """How many pieces of work ``worker`` has: whole tiles and at most one part of a split one.

    >>> [pieces(w, 4, 10, 2, 2) for w in range(4)]
    [3, 3, 3, 3]
    """
    return whole_tiles(worker, workers, tiles, split) + (1 if worker < split * parts else 0)


def piece(index, worker, workers, tiles, split, parts, steps):
    """Piece ``index`` of ``worker``: its tile and its steps ``first..last-1``.

    >>> [piece(i, 3, 4, 10, 2, 2, 8) for i in range(3)]
    [(3, 0, 8), (7, 0, 8), (9, 4, 8)]
    """
    if index < whole_tiles(worker, workers, tiles, split):
        return worker + index * workers, 0, steps
    part = divide(worker, split)
    first, last = divide(part * steps, parts), divide((part + 1) * steps, parts)
    return tiles - split + worker - part * split, first, last


def part_of(worker, cluster, steps):
    """Tile of ``worker``, and its part of the steps, where a cluster of CTAs has a tile.

    >>> [part_of(worker, 2, 5) for worker in range(4)]
    [(0, 0, 2), (0, 2, 5), (1, 0, 2), (1, 2, 5)]
    """
    number = divide(worker, cluster)
    part = worker - number * cluster
    return number, divide(part * steps, cluster), divide((part + 1) * steps, cluster)


def owner_of(warp, cluster, warps):
    """Rank of the CTA of a cluster that adds up and stores what consumer warp ``warp`` of ``warps`` holds.

    >>> [owner_of(warp, 2, 8) for warp in range(8)]
    [0, 0, 0, 0, 1, 1, 1, 1]
    """
    return warp * cluster // warps


def first_warp(rank, cluster, warps):
    """The first consumer warp that CTA ``rank`` of a cluster owns, or the next one's if it owns none.

    >>> [first_warp(rank, 3, 8) for rank in range(4)]
    [0, 3, 6, 8]
    """
    return divide(rank * warps + cluster - 1, cluster)


def run_of(step, run_steps):
    """The run of ``run_steps`` steps that ``step`` is in, and how many of its steps are left.

    >>> run_of(7, 3)
    (2, 2)
    """
    run = divide(step, run_steps)
    return run, (run + 1) * run_steps - step


def place(tile, row_tiles, token_tiles, group):
    """``(row tile, token tile)`` of a tile number: ``group`` row tiles at a time, so that the tiles under way at one
    time share rows and tokens in the L2 cache.

    >>> [place(t, 3, 2, 2) for t in range(6)]
    [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    """
    if token_tiles == 1:  # few tokens again
        return tile, 0
    return banded(tile, row_tiles, token_tiles, group)


def banded(tile, row_tiles, token_tiles, group):
    """:func:`place` by its rule alone, for kernels whose registers a shortcut would spill.

    >>> [banded(t, 3, 2, 2) for t in range(6)] == [place(t, 3, 2, 2) for t in range(6)]
    True
    """
    band = divide(tile, group * token_tiles)
    inside = tile - band * group * token_tiles
    height = min(group, row_tiles - band * group)
    token = divide(inside, height)
    return band * group + inside - token * height, token


def nth(index, worker, workers):
    """Tile ``index`` of ``worker`` where tiles are dealt in rounds, in each of which all workers move up.

    Tiles of experts come in a pattern of dear and cheap ones; were ``workers`` a multiple of its length, some would
    always get the dear ones.

    >>> [[nth(i, worker, 4) for i in range(3)] for worker in (0, 3)]
    [[0, 5, 10], [3, 4, 9]]
    """
    moved = worker + index * SHIFT
    return index * workers + moved - divide(moved, workers) * workers


def share(worker, workers, tiles):
    """How many of ``tiles`` :func:`nth` deals to ``worker``.

    >>> [share(worker, 4, 10) for worker in range(4)]
    [2, 2, 3, 3]
    """
    rounds = divide(tiles, workers)
    return rounds + (1 if nth(rounds, worker, workers) < tiles else 0)
