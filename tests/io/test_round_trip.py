"""save and load: what comes back is what went in, bit for bit."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from nmsparse import NMSparseError, formats
from nmsparse.formats import SparseArray
from nmsparse.io import Checkpoint, load, save
from nmsparse.io.schema import Entry

PATTERNS = ["2:4", "1:4", "3:7", "vnm:4:2:8", "samoyeds:1:2:16", "samoyeds:3:5:8"]
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def assert_same_bits(a, b):
    assert type(a) is type(b)
    if isinstance(a, SparseArray):
        assert (a.pattern, a.shape) == (b.pattern, b.shape)
        assert a.buffers().keys() == b.buffers().keys()
        for name, buffer in a.buffers().items():
            assert_same_bits(buffer, b.buffers()[name])
    else:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(6, 40), (3, 5, 19), (0, 4, 16), (4, 0)], ids=str)
def test_sparse_arrays(tmp_path, pattern, dtype, shape):
    array = formats.random(shape, pattern, dtype=dtype, rng=1)
    save(tmp_path / "w.safetensors", {"w": array})
    assert_same_bits(load(tmp_path / "w.safetensors")["w"], array)


@pytest.mark.parametrize("bits", [0x7FC1, 0xFFA5, 0x8000, 0x0001, 0x7F80, 0xFF80], ids=hex)
def test_bfloat16_keeps_every_bit(tmp_path, bits):
    w = np.full((2, 16), bits, np.uint16).view(ml_dtypes.bfloat16)
    array = formats.from_dense(w, "2:4")
    save(tmp_path / "w.safetensors", {"w": array, "dense": w})
    loaded = load(tmp_path / "w.safetensors")
    assert (loaded["w"].values.view(np.uint16) == bits).all()
    assert (loaded["dense"].view(np.uint16) == bits).all()


@pytest.mark.parametrize(
    "dtype",
    [
        *("bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", ">i4", ">f8"),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu),
    ],
    ids=lambda d: d if isinstance(d, str) else np.dtype(d).name,
)
def test_dense_arrays(tmp_path, dtype, rng):
    array = rng.integers(0, 2, (3, 5)).astype(dtype)
    save(
        tmp_path / "d.safetensors", {"d": array, "scalar": array[0, 0], "empty": array[:0], "strided": array[::2, ::-2]}
    )
    loaded = load(tmp_path / "d.safetensors")
    native = array.dtype.newbyteorder("=")
    assert_same_bits(loaded["d"], array.astype(native))
    assert_same_bits(loaded["scalar"], np.asarray(array[0, 0].astype(native)))
    assert_same_bits(loaded["empty"], array[:0].astype(native))
    assert_same_bits(loaded["strided"], np.ascontiguousarray(array[::2, ::-2], native))


def test_the_file_is_plain_safetensors(tmp_path):
    array = formats.random((2, 8, 32), "samoyeds:1:2:16", rng=0)
    save(tmp_path / "w.safetensors", {"w": array, "b": np.arange(3.0)}, {"origin": "a test"})
    stored = load_file(tmp_path / "w.safetensors")
    assert sorted(stored) == ["b", "w.indices", "w.meta", "w.values"]
    for name, buffer in array.buffers().items():
        assert_same_bits(stored[f"w.{name}"], buffer)
    with safe_open(tmp_path / "w.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["origin"] == "a test"
    entry = {"format": "samoyeds", "pattern": "samoyeds:1:2:16", "shape": [2, 8, 32], "dtype": "float32"}
    assert json.loads(metadata["nmsparse"]) == {"schema": 1, "arrays": {"w": entry}}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_schema_knows_the_buffers_of_each_format(pattern):
    array = formats.random((4, 16), pattern, rng=0)
    entry = Entry(array.pattern, array.shape, array.dtype)
    assert entry.buffer_names("w") == {buffer: f"w.{buffer}" for buffer in array.buffers()}


def test_a_checkpoint_reads_on_demand(tmp_path):
    array = formats.random((4, 32), "2:4", rng=0)
    path = save(tmp_path / "w.safetensors", {"w": array, "b": np.ones(3, np.float16)}, {"origin": "a test"})
    checkpoint = Checkpoint(path)
    assert (list(checkpoint), len(checkpoint), checkpoint.sparse_names) == (["w", "b"], 2, ["w"])
    assert "w" in checkpoint and "w.values" not in checkpoint
    assert checkpoint.metadata == {"origin": "a test"}
    assert_same_bits(checkpoint["w"], array)
    w, b = checkpoint.describe("w"), checkpoint.describe("b")
    assert (w.pattern, w.format, w.dtype, w.shape, w.nbytes, w.density) == (
        "2:4",
        "nm",
        "float32",
        (4, 32),
        array.nbytes,
        0.5,
    )
    assert (b.pattern, b.format, b.dtype, b.shape, b.nbytes, b.density) == (None, "dense", "float16", (3,), 6, 1.0)
    assert repr(checkpoint).endswith("1 sparse and 1 dense arrays)")
    for missing in ("W", 3):
        with pytest.raises(KeyError, match="holds no array"):
            checkpoint[missing]
    with pytest.raises(KeyError, match="did you mean 'w'"):
        checkpoint["w1"]


def test_what_is_loaded_outlives_the_file(tmp_path):
    path = save(tmp_path / "w.safetensors", {"b": np.arange(1000)})
    loaded = load(path)["b"]
    path.write_bytes(b"")
    assert loaded.flags.writeable and loaded.sum() == 499500


def test_select(tmp_path):
    path = save(tmp_path / "w.safetensors", {"a.x": np.ones(1), "a.y": formats.random((4, 16), "2:4"), "b": np.ones(1)})
    assert set(load(path, select="a.")) == {"a.x", "a.y"}
    assert set(load(path, select=lambda name: name.endswith("x"))) == {"a.x"}
    assert set(load(path, select="nothing")) == set()
    with pytest.raises(NMSparseError, match="select: expected a prefix or a function of a name, got list"):
        load(path, select=["b"])


def test_overwriting_is_asked_for(tmp_path):
    path = save(tmp_path / "w.safetensors", {"b": np.zeros(2)})
    with pytest.raises(FileExistsError, match=r"w\.safetensors already exists"):
        save(path, {"b": np.ones(2)})
    assert load(path)["b"].tolist() == [0, 0]
    save(path, {"b": np.ones(2)}, overwrite=True)
    assert load(path)["b"].tolist() == [1, 1]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    path = save(tmp_path / "w.safetensors", {"b": np.zeros(2)})

    def broken(specs, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.serialize_file", broken)
    with pytest.raises(KeyboardInterrupt):
        save(path, {"b": np.ones(2)}, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    assert load(path)["b"].tolist() == [0, 0]


def test_the_file_has_ordinary_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert save(tmp_path / "w.safetensors", {}).stat().st_mode == plain.stat().st_mode


SPARSE = formats.random((4, 16), "2:4", rng=0)


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({"a": SPARSE, "a.values": np.ones(1)}, None, "would both be stored as 'a.values'"),
        ({"a.meta": np.ones(1), "a": SPARSE}, None, "would both be stored as 'a.meta'"),
        (
            {"a.values": SPARSE, "a": SPARSE, "a.values.meta": np.ones(1)},
            None,
            "would both be stored as 'a.values.meta'",
        ),
        ({"a": SPARSE, "x": SPARSE, "x.values": SPARSE}, None, "would both be named 'x.values'"),
        ({"": np.ones(1)}, None, "needs a name"),
        ({"__metadata__": np.ones(1)}, None, "needs a name"),
        ({3: np.ones(1)}, None, "needs a name"),
        ({"a": [1.0]}, None, "'a': expected a sparse array or a NumPy array, got list"),
        ({"a": np.array(["text"])}, None, "'a' has dtype <U4"),
        ({"a": np.array([object()])}, None, "'a' has dtype object"),
        ({"a": np.ones(1, np.complex128)}, None, "'a' has dtype complex128"),
        ({"a": np.ones(1, ml_dtypes.int4)}, None, "'a' has dtype int4"),
        ({}, {"nmsparse": "mine"}, "leave 'nmsparse' to nmsparse"),
        ({}, {"key": 1}, "strings to strings"),
        ({}, {1: "value"}, "strings to strings"),
    ],
)
def test_what_cannot_be_saved(tmp_path, arrays, metadata, message):
    with pytest.raises(NMSparseError, match=message):
        save(tmp_path / "w.safetensors", arrays, metadata)
    assert list(tmp_path.iterdir()) == []


def test_saving_into_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        save(tmp_path / "nowhere" / "w.safetensors", {})


def test_io_needs_no_safetensors_until_it_is_used():
    code = "import sys, nmsparse.io; print(sorted({'safetensors', 'tqdm', 'numba', 'torch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_missing_safetensors_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"nmsparse\[hf\]"):
        save(tmp_path / "w.safetensors", {})
