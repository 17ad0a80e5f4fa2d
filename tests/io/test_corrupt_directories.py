"""Damaged directories of shards: each way of breaking one, and the error that says so."""

import json
import shutil

import numpy as np
import pytest

from nmsparse import NMSparseError, formats
from nmsparse.io import load, save

ARRAYS = {
    "w": formats.random((2, 4, 32), "2:4", rng=0),
    "g": formats.random((4, 24), "2:6", rng=1),
    "v": formats.random((8, 32), "vnm:4:2:8", rng=2),
    "s": formats.random((6, 32), "samoyeds:2:3:16", rng=3),
    "d": np.arange(12, dtype=np.float32).reshape(3, 4),
}


# The directory: name -> (how it is changed, the exception, what it says)

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two shards, the sparse arrays in one and a dense one in the other."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save(folder / "a.safetensors", {name: array for name, array in ARRAYS.items() if name != "d"})
    save(folder / "b.safetensors", {"d": ARRAYS["d"]})
    weight_map = {f"{name}.{part}": "a.safetensors" for name in "wgvs" for part in ARRAYS[name].buffers()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | {"d": "b.safetensors"}}))
    return folder


def index(change):
    def rewrite(folder):
        found = json.loads((folder / INDEX).read_text())
        change(found["weight_map"])
        (folder / INDEX).write_text(json.dumps(found))

    return rewrite


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def drop(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def only(name):
    def change(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        if name:
            (folder / name).write_bytes(b"\x80\x04.")

    return change


def shadow(folder):
    """The dense tensor of the second shard takes the name of a sparse array of the first."""
    (folder / "b.safetensors").unlink()
    save(folder / "b.safetensors", {"w": ARRAYS["d"]})
    index(lambda weights: (weights.pop("d"), weights.update({"w": "b.safetensors"})))(folder)


def split(folder):
    """Both shards hold the array; the index takes its buffers from either."""
    (folder / "b.safetensors").unlink()
    save(folder / "b.safetensors", {"w": -ARRAYS["w"], "d": ARRAYS["d"]})
    index(lambda weights: weights.update({"w.meta": "b.safetensors"}))(folder)


DIRECTORIES = {
    "index not JSON": (write(INDEX, "{"), NMSparseError, "is not valid JSON"),
    "index not text": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe\xff"), NMSparseError, "is not valid JSON"),
    "index a list": (write(INDEX, "[]"), NMSparseError, "should be a JSON object, got list"),
    "index without weight_map": (write(INDEX, "{}"), NMSparseError, "expected an object 'weight_map'"),
    "index with an empty weight_map": (
        write(INDEX, '{"weight_map": {}}'),
        NMSparseError,
        "expected an object 'weight_map'",
    ),
    "index with a list": (write(INDEX, '{"weight_map": ["d"]}'), NMSparseError, "expected an object 'weight_map'"),
    "index naming a tensor twice": (
        write(INDEX, '{"weight_map": {"d": "b.safetensors", "d": "a.safetensors"}}'),
        NMSparseError,
        "holds the name 'd' twice",
    ),
    "shard missing": (drop("b.safetensors"), FileNotFoundError, r"b\.safetensors: no such file, though .* lists it"),
    "shard damaged": (write("b.safetensors", "text"), NMSparseError, r"b\.safetensors: not a safetensors file"),
    "shard a directory": (
        lambda f: ((f / "b.safetensors").unlink(), (f / "b.safetensors").mkdir()),
        NMSparseError,
        r"b\.safetensors: expected a safetensors file, this is no regular file",
    ),
    "tensor missing": (
        index(lambda weights: weights.update({"e": "b.safetensors"})),
        NMSparseError,
        r"b\.safetensors: tensor 'e' is not in this shard",
    ),
    "tensor in another shard": (
        index(lambda weights: weights.update({"d": "a.safetensors"})),
        NMSparseError,
        r"a\.safetensors: tensor 'd' is not in this shard",
    ),
    "buffer not listed": (
        index(lambda weights: weights.pop("w.meta")),
        NMSparseError,
        r"does not list tensor 'w\.meta' of array 'w'",
    ),
    "buffers of an array in two shards": (
        split,
        NMSparseError,
        r"does not list tensor 'w\.meta' of array 'w' in a\.safetensors",
    ),
    "sparse and dense of one name": (shadow, NMSparseError, "'w' names both a sparse array and a dense tensor"),
    "several indices": (
        lambda f: ((f / INDEX).rename(f / "x.safetensors.index.json"), write("y.safetensors.index.json", "{}")(f)),
        NMSparseError,
        "holds several indices",
    ),
    "several files and no index": (
        drop(INDEX),
        NMSparseError,
        r"2 safetensors files and no \*\.safetensors\.index\.json",
    ),
    "empty": (only(None), NMSparseError, "holds no safetensors checkpoint"),
    "pickled": (only("pytorch_model.bin"), NMSparseError, r"pytorch_model\.bin is a pickled checkpoint"),
    "gone": (shutil.rmtree, FileNotFoundError, "checkpoint: no such file or directory"),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_directory(folder, case):
    change, exception, message = DIRECTORIES[case]
    change(folder)
    with pytest.raises(exception, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "outside", ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", "..\\b.safetensors", "..", ".", "", 3, None]
)
def test_an_index_cannot_reach_out_of_its_directory(folder, outside):
    shutil.copy(folder / "b.safetensors", folder.parent)
    index(lambda weights: weights.update({"d": outside}))(folder)
    with pytest.raises(NMSparseError, match=r"tensor 'd' lies in .*; expected the name of a file beside the index"):
        load(folder)


def test_the_intact_directory_loads(folder):
    assert set(load(folder)) == set(ARRAYS) == set(load(folder / INDEX))


def test_a_pickled_file_is_not_opened(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(NMSparseError, match="pickled checkpoint, which nmsparse never opens"):
        load(tmp_path / "model.pt")


def test_what_an_index_does_not_list_is_not_read(folder):
    """As transformers does: tied weights often lie in a shard without being listed."""
    index(lambda weights: [weights.pop(f"s.{part}") for part in ("values", "meta", "indices")])(folder)
    assert set(load(folder)) == set(ARRAYS) - {"s"}
