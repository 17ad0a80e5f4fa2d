"""The fragment maps own every element exactly once, and a product computed lane by lane is the product."""

from __future__ import annotations

import numpy as np
import pytest

import nmsparse
from nmsparse.formats import fragments as f
from nmsparse.formats import metadata

LANE, REG4, HALF = np.ogrid[:32, :4, :2]
THREAD = np.arange(128)


def owned_once(coordinates, shape):
    """Every element of ``shape`` is named exactly once."""
    count = np.zeros(shape, int)
    np.add.at(count, coordinates, 1)
    return (count == 1).all()


def test_every_element_has_one_owner():
    assert owned_once(f.mma_sp_a(LANE, REG4, HALF), (16, 16))
    assert owned_once(f.mma_sp_b(LANE, REG4, HALF), (32, 8))
    assert owned_once(f.mma_sp_d(*np.ogrid[:32, :4]), (16, 8))
    assert owned_once(f.wgmma_sp_a(*np.ogrid[:128, :4, :2]), (64, 16))
    for n in (8, 64, 256):
        assert owned_once(f.wgmma_sp_d(*np.ogrid[:128, : n // 2]), (64, n))


@pytest.mark.parametrize("selector", [0, 1])
def test_sixteen_lanes_hold_the_metadata_of_a_tile(selector):
    lanes = f.meta_lanes(selector)
    assert owned_once(f.mma_sp_meta(lanes[:, None], np.arange(2)), (16, 2))
    threads = (32 * np.arange(4)[:, None] + lanes).reshape(-1, 1)
    assert owned_once(f.wgmma_sp_meta(threads, np.arange(2)), (64, 2))


def test_both_selectors_split_the_lanes():
    assert sorted([*f.meta_lanes(0), *f.meta_lanes(1)]) == list(range(32))


@pytest.mark.parametrize("selector", [0, 1])
def test_a_tile_product_lane_by_lane(selector):
    """What ``mma.sp.m16n8k32`` computes, from registers filled by the maps alone."""
    rng = np.random.default_rng(selector)
    A = nmsparse.random((16, 32), "2:4", rng=rng)
    b = rng.standard_normal((32, 8)).astype(np.float32)
    a_regs = A.values[f.mma_sp_a(LANE, REG4, HALF)]
    b_regs = b[f.mma_sp_b(LANE, REG4, HALF)]
    e_regs = np.full((32, 2), 0xDEAD, np.uint16)  # lanes outside the selector hold what must not be read
    lanes = f.meta_lanes(selector)
    e_regs[lanes] = A.meta[f.mma_sp_meta(lanes[:, None], np.arange(2))]

    stored, tokens, words = np.zeros((16, 16)), np.zeros((32, 8)), np.zeros((16, 2), np.uint16)
    stored[f.mma_sp_a(LANE, REG4, HALF)] = a_regs
    tokens[f.mma_sp_b(LANE, REG4, HALF)] = b_regs
    words[f.mma_sp_meta(lanes[:, None], np.arange(2))] = e_regs[lanes]
    columns = 4 * np.arange(8)[:, None] + metadata.unpack(words)
    d = np.einsum("rv,rvn->rn", stored, tokens[columns.reshape(16, 16)])
    np.testing.assert_allclose(d, A.todense() @ b, rtol=1e-5, atol=1e-5)
    d_regs = d[f.mma_sp_d(*np.ogrid[:32, :4])]
    assert d_regs[0].tolist() == [d[0, 0], d[0, 1], d[8, 0], d[8, 1]]


def test_warpgroup_maps_are_four_warps_of_16_rows():
    for warp in range(4):
        threads = THREAD[32 * warp : 32 * warp + 32]
        rows, _ = f.wgmma_sp_d(threads[:, None], np.arange(4))
        np.testing.assert_array_equal(rows, 16 * warp + f.mma_sp_d(np.arange(32)[:, None], np.arange(4))[0])


def test_core_matrices_tile_shared_memory():
    """A 64×16 operand: 8 × 2 core matrices of 64 elements, no gap and no overlap, each row of 8 contiguous."""
    row, col = np.ogrid[:64, :16]
    offsets = f.core_matrix(row, col, leading=64, stride=128)
    assert sorted(offsets.ravel()) == list(range(64 * 16))
    np.testing.assert_array_equal(np.diff(offsets[:, :8], axis=1), 1)


def test_swizzle_spreads_a_column_over_all_banks():
    """Eight rows of one 16-byte column fall on eight different chunks, so ``ldmatrix`` meets no bank conflict."""
    for chunk in range(8):
        assert sorted(f.swizzle_128b(np.arange(8), chunk)) == list(range(8))
    for row in range(8):
        assert [f.swizzle_128b(row, f.swizzle_128b(row, c)) for c in range(8)] == list(range(8)), "its own inverse"
