"""Packed blocks hold every value and every word once, where the instructions read them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmsparse
from nmsparse.cuda import layout
from nmsparse.formats import fragments, metadata


def unpacked(packed, shape):
    """The dense matrix in ``packed`` blocks, read as ``wgmma.sp`` does: 64 rows × 32 columns at a time."""
    down, along, _ = packed.shape
    dense = np.zeros((down * 64, along * 64), np.float32)
    row, col = np.ogrid[:64, :16]
    threads = np.arange(128)
    threads = threads[np.isin(threads % 32, fragments.meta_lanes(0))]
    for i, j in np.ndindex(down, along):
        block = packed[i, j]
        values, words = block[: layout.VALUE_BYTES].view(np.float16), block[layout.VALUE_BYTES :].view(np.uint32)
        for half in (0, 1):
            stored = values[half * 128 + fragments.core_matrix(row, col, leading=64, stride=256)]
            lane, warp = threads % 32, threads // 32
            register = words[(warp * 16 + lane // 4 * 2 + lane % 2) * 2 + half]
            meta = np.zeros((64, 2), np.uint16)
            for high in (0, 1):
                meta[fragments.wgmma_sp_meta(threads, high)] = register >> 16 * high & 0xFFFF
            columns = 4 * np.arange(8)[:, None] + metadata.unpack(meta)
            part = dense[i * 64 : i * 64 + 64, j * 64 + 32 * half :][:, :32]
            np.put_along_axis(part, columns.reshape(64, 16).astype(int), stored.astype(np.float32), axis=1)
    assert not dense[shape[0] :].any() and not dense[:, shape[1] :].any(), "padding is not zero"
    return dense[: shape[0], : shape[1]]


@given(st.integers(1, 200), st.integers(1, 300), st.integers(0, 99))
def test_blocks_are_what_the_instruction_reads(rows, columns, seed):
    W = nmsparse.NMArray.random((rows, columns), dtype=np.float16, rng=seed)
    packed = layout.pack_blocks(W.values, W.meta)
    assert packed.shape == (*layout.blocks_of(rows, columns), layout.BLOCK_BYTES)
    np.testing.assert_array_equal(unpacked(packed, W.shape), W.todense())


def test_every_byte_of_a_block_is_used_once():
    row = np.arange(64)[:, None]
    places = np.concatenate(
        [layout.value_offset(row, np.arange(32)).ravel(), layout.meta_offset(row, np.arange(4)).ravel()]
    )
    assert sorted(places) == list(range(0, layout.BLOCK_BYTES, 2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_padding_is_valid_metadata(dtype):
    """Positions that do not ascend are undefined on the hardware, also for zeros."""
    import ml_dtypes

    values = np.ones((3, 8), np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    packed = layout.pack_blocks(values, np.full((3, 1), 0xEEEE, np.uint16))
    assert metadata.ascending(packed[..., layout.VALUE_BYTES :].view(np.uint16)).all()


def test_values_are_core_matrices():
    row, col = np.ogrid[:64, :32]
    np.testing.assert_array_equal(
        layout.value_offset(row, col), 2 * fragments.core_matrix(row, col, leading=64, stride=256)
    )


@given(st.integers(1, 100).map(lambda n: 2 * n))
def test_every_gate_row_has_its_up_row_eight_below(rows):
    """Packed rows g and g + 8 of each 16 belong to one thread of a product (:func:`fragments.wgmma_sp_d`)."""
    order = layout.interleaved(rows).reshape(-1, 2, 8)
    gate, up = order[:, 0].ravel(), order[:, 1].ravel()
    neurons = rows // 2
    np.testing.assert_array_equal(gate[:neurons], np.arange(neurons))
    np.testing.assert_array_equal(up[:neurons], np.arange(neurons) + neurons)
    assert (gate[neurons:] == -1).all() and (up[neurons:] == -1).all() and len(gate) < neurons + 8
    row, _ = fragments.wgmma_sp_d(np.arange(128), 0)
    below, _ = fragments.wgmma_sp_d(np.arange(128), 2)
    np.testing.assert_array_equal(below, row + 8)
