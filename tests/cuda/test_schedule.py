"""Every step of every tile is computed exactly once, and the load is even."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmsparse.cuda import schedule


@st.composite
def launches(draw):
    """``workers, tiles, split, parts, steps`` that a launch may have: a worker for each part, a step for each part."""
    workers, tiles, steps = draw(st.integers(1, 200)), draw(st.integers(0, 600)), draw(st.integers(1, 300))
    parts = draw(st.integers(1, min(workers, steps)))
    return workers, tiles, draw(st.integers(0, min(tiles, workers // parts))), parts, steps


def pieces_of(worker, workers, tiles, split, parts, steps):
    count = schedule.pieces(worker, workers, tiles, split, parts)
    return [schedule.piece(i, worker, workers, tiles, split, parts, steps) for i in range(count)]


@given(launches())
def test_every_step_is_covered_once(launch):
    workers, tiles, _, _, steps = launch
    covered = [[] for _ in range(tiles)]
    for worker in range(workers):
        for number, first, last in pieces_of(worker, *launch):
            assert first < last
            covered[number].append((first, last))
    for runs in covered:
        ends = [0, *(last for _, last in sorted(runs))]
        assert [first for first, _ in sorted(runs)] == ends[:-1] and ends[-1] == steps


@given(st.integers(2, 8), st.integers(1, 66), st.integers(8, 300))
def test_a_cluster_covers_its_tile_once(cluster, tiles, steps):
    """By parts that differ by a step at the most, in the order of ranks."""
    for tile in range(tiles):
        parts = [schedule.part_of(tile * cluster + rank, cluster, steps) for rank in range(cluster)]
        assert {number for number, _, _ in parts} == {tile}
        ends = [0, *(last for _, _, last in parts)]
        assert [first for _, first, _ in parts] == ends[:-1] and ends[-1] == steps
        sizes = {last - first for _, first, last in parts}
        assert max(sizes) - min(sizes) <= 1


@given(launches())
def test_the_load_is_even(launch):
    workers, tiles, split, parts, _ = launch
    whole = [schedule.whole_tiles(worker, workers, tiles, split) for worker in range(workers)]
    assert max(whole) - min(whole) <= 1 and sum(whole) == tiles - split
    shares = [last - first for w in range(split * parts) for _, first, last in pieces_of(w, *launch)[whole[w] :]]
    assert not shares or max(shares) - min(shares) <= 1
    assert len(shares) == split * parts


@given(launches())
def test_owners_find_their_peers(launch):
    """The owner adds the sums of workers ``split, 2·split, …`` further on, in the order of k; each stores one sum."""
    workers, _, split, parts, steps = launch
    stored = Counter()
    for worker in range(workers):
        for number, first, last in pieces_of(worker, *launch):
            if first > 0:
                stored[worker] += 1
            elif last < steps:
                peers = [pieces_of(worker + part * split, *launch)[-1] for part in range(1, parts)]
                assert [peer[0] for peer in peers] == [number] * (parts - 1)
                assert [first for _, first, _ in peers] == [last for _, _, last in [(number, 0, last), *peers]][:-1]
                assert peers[-1][2] == steps
    assert set(stored.values()) <= {1}
    assert len(stored) == split * (parts - 1)


@given(st.integers(0, 500), st.integers(1, 40), st.integers(1, 60))
def test_a_part_counts_runs_as_the_whole_does(first, run_steps, steps):
    """A kernel asks once, where its part begins, and counts from there on: each step in its run."""
    run, left = schedule.run_of(first, run_steps)
    for step in range(first, first + steps):
        assert run == step // run_steps and 1 <= left <= run_steps
        left -= 1
        if left == 0:
            run, left = run + 1, run_steps


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12))
def test_places_are_all_tiles(row_tiles, token_tiles, group):
    tiles = range(row_tiles * token_tiles)
    places = {schedule.place(tile, row_tiles, token_tiles, group) for tile in tiles}
    assert all(
        schedule.banded(t, row_tiles, token_tiles, group) == schedule.place(t, row_tiles, token_tiles, group)
        for t in tiles
    )
    assert places == {(row, token) for row in range(row_tiles) for token in range(token_tiles)}


@pytest.mark.parametrize("group", [1, 4, 8])
def test_neighbours_share_rows(group):
    """Any ``group · n`` tiles in a row touch about ``group`` row tiles: what the L2 cache keeps."""
    places = [schedule.place(tile, 16, 10, group) for tile in range(group * 10)]
    assert {row for row, _ in places} == set(range(group))


@given(st.integers(1, 200), st.integers(0, 2000))
def test_rounds_deal_every_tile_once_and_evenly(workers, tiles):
    hands = [
        [schedule.nth(i, worker, workers) for i in range(schedule.share(worker, workers, tiles))]
        for worker in range(workers)
    ]
    assert sorted(itertools.chain(*hands)) == list(range(tiles))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


def test_no_pattern_of_tiles_meets_the_same_workers():
    """11 tiles of rows by three of tokens, the last of which is cheap: 33 in all, a quarter of 132 workers."""
    cheap = Counter(
        worker
        for worker in range(132)
        for i in range(schedule.share(worker, 132, 1980))
        if schedule.nth(i, worker, 132) % 33 >= 22
    )
    assert all(3 <= cheap[worker] <= 7 for worker in range(132))


@pytest.mark.parametrize("cluster", range(2, 9))
@pytest.mark.parametrize("warps", [4, 8])
def test_the_warps_of_a_cluster_have_one_owner_each(warps, cluster):
    """And what the others send to an owner lies in its ring side by side, from the first of its warps on."""
    owners = [schedule.owner_of(warp, cluster, warps) for warp in range(warps)]
    firsts = [schedule.first_warp(rank, cluster, warps) for rank in range(cluster + 1)]
    assert firsts[0] == 0 and firsts[-1] == warps
    for rank in range(cluster):
        assert [w for w in range(warps) if owners[w] == rank] == [*range(firsts[rank], firsts[rank + 1])]
        assert firsts[rank + 1] - firsts[rank] <= -(-warps // cluster)
