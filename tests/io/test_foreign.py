"""Readers of others' layouts, against writers made from the public descriptions, or the libraries themselves."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nmsparse import NMArray, NMSparseError, SamoyedsArray
from nmsparse.io import foreign

FLOATS = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
SHAPES = [(32, 16), (32, 64), (64, 128), (96, 32), (128, 256)]


def dense_24(shape, dtype=np.float16, seed=0):
    """A weight with two non-zeros in every group of four."""
    return NMArray.random(shape, dtype=dtype, rng=seed).todense()


def kept(w):
    """The two positions and values of each group, by a plain loop."""
    groups = w.reshape(w.shape[0], -1, 4)
    positions = np.array([[np.flatnonzero(group) for group in row] for row in groups])
    return positions, np.take_along_axis(groups, positions, -1).reshape(w.shape[0], -1)


# --- CUTLASS through torch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 64), (128, 256)])
def test_cutlass(shape, dtype):
    """Against the conversion that torch itself has in Python, on weights with fewer than two non-zeros as well."""
    torch = pytest.importorskip("torch")
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    w = torch.from_numpy(dense_24(shape).astype(np.float32)).to(getattr(torch, dtype))
    w[torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.2] = 0
    packed, meta = sparse_semi_structured_from_dense_cutlass(w)
    values = packed.view(torch.int16).numpy().view(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    A = foreign.from_cutlass(values, meta.numpy(), shape)
    A.check_format(full=True)
    assert np.array_equal(A.todense().astype(np.float32), w.float().numpy())


# --- cuSPARSELt ------------------------------------------------------------------------------------------------------


def cusparselt(w):
    """``[values | metadata]`` as the layout is described: nibbles in tiles of 64 rows by 8 groups."""
    positions, values = kept(w)
    rows, groups = positions.shape[:2]
    tiles_k = -(-groups // 8)
    nibbles = np.zeros(-(-rows // 64) * tiles_k * 512, np.uint16)
    for row in range(rows):
        for group in range(groups):
            r, g = row % 32, group % 8
            place = r % 8 * 16 + r // 8 % 2 + r // 16 * 128 + g % 4 * 4 + (2 if g >= 4 else 0)
            place += row // 32 % 2 * 256 + group // 8 * 512 + row // 64 * tiles_k * 512
            nibbles[place] = positions[row, group, 0] | positions[row, group, 1] << 2
    words = nibbles.reshape(-1, 4)
    words = words[:, 0] | words[:, 1] << 4 | words[:, 2] << 8 | words[:, 3] << 12
    return np.concatenate([values.reshape(-1).view(np.uint16), words]).view(w.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (16, 48), (80, 80)])
def test_cusparselt(shape, dtype):
    w = dense_24(shape, dtype)
    A = foreign.from_cusparselt(cusparselt(w).reshape(1, -1), shape)
    assert A.dtype == dtype and np.array_equal(A.todense(), w)


def test_cusparselt_places_are_a_permutation():
    """Each code of full tiles is read once."""
    from nmsparse.io.foreign.cusparselt import _places

    assert np.array_equal(np.sort(_places(128, 32).reshape(-1)), np.arange(128 * 32))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 128), (96, 64), (4096, 1408)])
def test_cusparselt_itself(shape):
    torch = pytest.importorskip("torch")
    if (
        not torch.cuda.is_available()
        or torch.cuda.get_device_capability()[0] != 9
        or not torch.backends.cusparselt.is_available()
    ):
        pytest.skip("the order is that of compute capability 9.x")
    w = dense_24(shape)
    packed = torch._cslt_compress(torch.from_numpy(w).cuda()).cpu().numpy()
    assert np.array_equal(foreign.from_cusparselt(packed, shape).todense(), w)


# --- compressed-tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 16), *SHAPES])
def test_bitmask(tmp_path, shape, dtype):
    w = dense_24(shape, dtype)
    bitmask = np.packbits(w != 0, axis=-1, bitorder="little")
    compressed = kept(w)[1]
    assert np.array_equal(foreign.from_bitmask(compressed, bitmask, shape).todense(), w)
    tensors = {
        "layer.0.compressed": compressed,
        "layer.0.bitmask": bitmask,
        "layer.0.shape": np.array(shape).reshape(-1, 1),
        "norm.weight": np.ones(3, np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = foreign.read_bitmask_checkpoint(tmp_path)
    assert list(found) == ["layer.0.weight"] and np.array_equal(found["layer.0.weight"].todense(), w)
    del tensors["layer.0.shape"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(NMSparseError, match=r"without layer\.0\.shape"):
        foreign.read_bitmask_checkpoint(tmp_path)


# --- JAX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16), *SHAPES])
def test_jax(shape):
    """Words made by the definition of nm_pack: digits in base m, over the kept positions of 16 columns."""
    w = dense_24(shape)
    words = np.array(
        [
            [sum(int(p) % 4 * 4**i for i, p in enumerate(np.flatnonzero(run))) for run in row.reshape(-1, 16)]
            for row in w
        ],
        np.uint16,
    )
    assert np.array_equal(foreign.from_jax(kept(w)[1], words, shape).todense(), w)


# --- Samoyeds --------------------------------------------------------------------------------------------------------


def exchange(fields):
    """Of each 16 x 16 two-bit fields, the top right and the bottom left 8 x 8 change places."""
    out = fields.copy()
    for top in range(0, fields.shape[0], 16):
        for left in range(0, fields.shape[1], 16):
            out[top : top + 8, left + 8 : left + 16] = fields[top + 8 : top + 16, left : left + 8]
            out[top + 8 : top + 16, left : left + 8] = fields[top : top + 8, left + 8 : left + 16]
    return out


@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.parametrize(("n", "m", "v"), [(1, 2, 128), (1, 2, 32), (2, 4, 64), (3, 4, 32)])
def test_samoyeds(n, m, v, exchanged):
    A = SamoyedsArray.random((64, 256), n, m, v, dtype=np.float16, rng=0)
    # metadata: 16 fields a uint32, field i at bits 2i
    fields = np.array([[int(word) >> 2 * i & 3 for word in row for i in range(8)] for row in A.meta], np.uint64)
    fields = exchange(fields) if exchanged else fields
    words = (fields.reshape(fields.shape[0], -1, 16) << (2 * np.arange(16, dtype=np.uint64))).sum(-1).astype(np.uint32)
    indices = A.indices.T.astype(np.uint32)
    B = foreign.from_samoyeds_kernel(A.values, indices, words, A.shape, n=n, m=m, v=v, exchanged=exchanged)
    assert np.array_equal(B.todense(), A.todense())
    # and element by element, as the kernel's own decoder says
    dense = np.zeros(A.shape, np.float16)
    plain = exchange(fields) if exchanged else fields
    for r in range(A.values.shape[0]):
        for c in range(A.values.shape[1]):
            row = r // n * m + int(indices[c // 2 * 4 // v, r])
            dense[row, c // 2 * 4 + int(plain[r, c])] = A.values[r, c]
    assert np.array_equal(B.todense(), dense)


# --- what none of them takes -----------------------------------------------------------------------------------------


def test_wrong_sizes_dtypes_and_codes():
    w = dense_24((32, 64))
    values = kept(w)[1]
    words = NMArray.from_dense(w).meta
    with pytest.raises(NMSparseError, match="M a multiple of 32"):
        foreign.from_cutlass(values[:16], words[:16].view(np.int16), (16, 64))
    with pytest.raises(NMSparseError, match="expected meta as int16 or uint16"):
        foreign.from_cutlass(values, words.astype(np.int32), (32, 64))
    with pytest.raises(NMSparseError, match="do not ascend"):
        foreign.from_cutlass(values, np.zeros((32, 4), np.int16), (32, 64))
    with pytest.raises(NMSparseError, match="expected packed"):
        foreign.from_cusparselt(cusparselt(w)[:-200], (32, 64))
    with pytest.raises(NMSparseError, match="do not ascend"):
        foreign.from_cusparselt(cusparselt(w) * 0, (32, 64))
    with pytest.raises(NMSparseError, match="two bits"):
        foreign.from_bitmask(values, np.full((32, 8), 7, np.uint8), (32, 64))
    with pytest.raises(NMSparseError, match="expected compressed"):
        foreign.from_bitmask(values[:16], np.full((32, 8), 0x55, np.uint8), (32, 64))
    with pytest.raises(NMSparseError, match="do not ascend"):
        foreign.from_jax(values, np.zeros((32, 4), np.uint16), (32, 64))
    A = SamoyedsArray.random((64, 128), dtype=np.float16, rng=0)
    indices, meta = A.indices.T.astype(np.uint32), A.meta.view(np.uint32)
    with pytest.raises(NMSparseError, match=r"outside 0\.\.1"):
        foreign.from_samoyeds_kernel(A.values, indices + 1000, meta, A.shape, exchanged=False)
    with pytest.raises(NMSparseError, match="expected indices"):
        foreign.from_samoyeds_kernel(A.values, indices.T, meta, A.shape, exchanged=False)
