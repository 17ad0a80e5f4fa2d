"""Damaged files: each way of breaking one, and the error that says so. Nothing here may pass, crash or load."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest

from nmsparse import NMSparseError, formats
from nmsparse.io import Checkpoint, load, save

BF16 = ml_dtypes.bfloat16
ARRAYS = {
    "w": formats.random((2, 4, 32), "2:4", dtype=BF16, rng=0),
    "g": formats.random((4, 24), "2:6", rng=1),
    "v": formats.random((8, 32), "vnm:4:2:8", rng=2),
    "s": formats.random((6, 32), "samoyeds:2:3:16", rng=3),
    "d": np.arange(12, dtype=np.float32).reshape(3, 4),
}


@pytest.fixture
def path(tmp_path):
    return save(tmp_path / "w.safetensors", ARRAYS)


def length(n):
    return struct.pack("<Q", n)


def header(**tensors):
    return json.dumps(
        {name: {"dtype": d, "shape": s, "data_offsets": o} for name, (d, s, o) in tensors.items()}
    ).encode()


# The container: name -> (bytes of the good file -> bytes of the bad one)

CONTAINERS = {
    "empty file": lambda raw: b"",
    "seven bytes": lambda raw: raw[:7],
    "only the header length": lambda raw: raw[:8],
    "truncated inside the header": lambda raw: raw[:100],
    "truncated inside the data": lambda raw: raw[:-200],
    "last byte missing": lambda raw: raw[:-1],
    "one byte too many": lambda raw: raw + b"\0",
    "header length zero": lambda raw: length(0) + raw[8:],
    "header length beyond the file": lambda raw: length(len(raw)) + raw[8:],
    "header length of exabytes": lambda raw: length(2**63) + raw[8:],
    "garbage instead of a header": lambda raw: raw[:8] + b"\xff" * 64 + raw[72:],
    "a pickle": lambda raw: b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.",
    "a zip": lambda raw: b"PK\x03\x04" + raw,
    "text": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "header is a list": lambda raw: length(2) + b"[]",
    "unknown dtype code": lambda raw: length(len(h := header(a=("Q4", [4], [0, 4])))) + h + b"abcd",
    "negative size": lambda raw: length(len(h := header(a=("U8", [-4], [0, 4])))) + h + b"abcd",
    "size that is no integer": lambda raw: length(len(h := header(a=("U8", [4.5], [0, 4])))) + h + b"abcd",
    "shape larger than the bytes": lambda raw: length(len(h := header(a=("U8", [5], [0, 4])))) + h + b"abcd",
    "sizes that overflow": lambda raw: length(len(h := header(a=("U8", [2**62, 2**62], [0, 4])))) + h + b"abcd",
    "offsets that overlap": lambda raw: (
        length(len(h := header(a=("U8", [4], [0, 4]), b=("U8", [2], [2, 4])))) + h + b"abcd"
    ),
    "offsets with a hole": lambda raw: (
        length(len(h := header(a=("U8", [2], [0, 2]), b=("U8", [2], [3, 5])))) + h + b"abcde"
    ),
    "offsets reversed": lambda raw: length(len(h := header(a=("U8", [4], [4, 0])))) + h + b"abcd",
    "offsets beyond the file": lambda raw: length(len(h := header(a=("U8", [4], [96, 100])))) + h + b"abcd",
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_container(path, case):
    path.write_bytes(CONTAINERS[case](path.read_bytes()))
    with pytest.raises(NMSparseError, match=r"w\.safetensors: not a safetensors file, or a damaged or truncated one"):
        load(path)


def test_a_tensor_named_twice(path):
    one = b'"a": {"dtype": "U8", "shape": [4], "data_offsets": [%d, %d]}'
    text = b"{" + one % (4, 8) + b", " + one % (0, 4) + b"}"
    path.write_bytes(length(len(text)) + text + b"abcd")
    with pytest.raises(NMSparseError, match=r"w\.safetensors: the header holds the name 'a' twice"):
        load(path)


def test_an_empty_tensor_of_absurd_shape(path):
    text = header(a=("U8", [2**62, 0, 2**62], [0, 0]))
    path.write_bytes(length(len(text)) + text)
    with pytest.raises(NMSparseError, match=r"w\.safetensors"):
        load(path)


def test_every_truncation(path):
    """Cut anywhere, a file is refused."""
    raw = path.read_bytes()
    for end in range(len(raw)):
        path.write_bytes(raw[:end])
        with pytest.raises(NMSparseError, match="damaged or truncated"):
            load(path)


def test_every_damaged_byte_of_the_header(path):
    """Any byte of the header changed: refused, or, where only a name or a dense dtype changed, still well formed."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    loaded = 0
    for position in range(8 + size):
        for flip in (0x01, 0x10, 0xFF):
            path.write_bytes(raw[:position] + bytes([raw[position] ^ flip]) + raw[position + 1 :])
            try:
                arrays = load(path)
            except NMSparseError:
                continue
            loaded += 1
            for array in arrays.values():
                if not isinstance(array, np.ndarray):
                    array.check_format(full=True)
                    array.todense()
    assert loaded < 0.1 * 3 * size


# The metadata: name -> (how it is changed, what the error says)


def entry(name, **changes):
    def change(raw):
        raw.describe(arrays=raw.arrays | {name: raw.arrays[name] | changes})

    return change


def without(name, field):
    def change(raw):
        raw.describe(
            arrays=raw.arrays | {name: {key: value for key, value in raw.arrays[name].items() if key != field}}
        )

    return change


def metadata(text):
    def change(raw):
        raw.header["__metadata__"]["nmsparse"] = text
        raw.write()

    return change


def arrays(change_arrays):
    return lambda raw: raw.describe(arrays=change_arrays(raw.arrays))


def rename(old, new):
    def change(raw):
        raw.header[new] = raw.header.pop(old)
        raw.write()

    return change


def retype(tensor, dtype, shape=None):
    def change(raw):
        raw.header[tensor] |= {"dtype": dtype} | ({"shape": shape} if shape else {})
        raw.write()

    return change


def poke(tensor, dtype, index, value):
    return lambda raw: raw.poke(tensor, dtype, index, value)


METADATA = {
    "not JSON": (metadata("{"), "'nmsparse' metadata is not valid JSON"),
    "nested without end": (metadata("[" * 100_000), "'nmsparse' metadata is not valid JSON"),
    "an integer without end": (metadata('{"schema": ' + "9" * 10_000 + "}"), "'nmsparse' metadata is not valid JSON"),
    "a list": (metadata("[]"), "metadata should be a JSON object, got list"),
    "no schema version": (metadata('{"arrays": {}}'), "schema version None, this nmsparse reads version 1"),
    "a later schema version": (lambda raw: raw.describe(schema=2), "schema version 2, this nmsparse reads version 1"),
    "a schema version as text": (lambda raw: raw.describe(schema="1"), "schema version '1'"),
    "no arrays": (metadata('{"schema": 1}'), "should hold an object 'arrays', got None"),
    "arrays as a list": (lambda raw: raw.describe(arrays=["w"]), r"should hold an object 'arrays', got \['w'\]"),
    "an array named twice": (metadata('{"schema": 1, "arrays": {"w": {}, "w": {}}}'), "holds the name 'w' twice"),
    "an entry that is text": (arrays(lambda a: a | {"w": "2:4"}), "array 'w': expected an object with format"),
    "an entry without format": (without("w", "format"), "array 'w': its metadata lacks format"),
    "an entry without pattern": (without("w", "pattern"), "array 'w': its metadata lacks pattern"),
    "an entry without shape": (without("w", "shape"), "array 'w': its metadata lacks shape"),
    "an entry without dtype": (without("w", "dtype"), "array 'w': its metadata lacks dtype"),
    "unknown format": (
        entry("w", format="blocked"),
        "array 'w': unknown format 'blocked'; this nmsparse knows nm, vnm, samoyeds",
    ),
    "format that is no text": (entry("w", format=["nm"]), "array 'w': unknown format"),
    "pattern not understood": (entry("w", pattern="2/4"), "array 'w': pattern '2/4' is not understood"),
    "pattern that is no text": (entry("w", pattern=24), "array 'w': a pattern is a string"),
    "pattern impossible": (entry("w", pattern="4:2"), "array 'w': pattern 4:2: expected"),
    "pattern with huge numbers": (entry("w", pattern="2:" + "9" * 5000), "array 'w': "),
    "pattern of another format": (entry("w", pattern="vnm:4:2:8"), "format 'nm' and pattern 'vnm:4:2:8' disagree"),
    "pattern of other buffers": (entry("w", pattern="1:4"), "array 'w': NMArray 1:4 .* expected values"),
    "shape as text": (entry("w", shape="2x4x32"), "array 'w': shape should be a list of sizes"),
    "shape negative": (entry("w", shape=[2, -4, 32]), "array 'w': shape should be a list of sizes"),
    "shape of floats": (entry("w", shape=[2, 4, 32.0]), "array 'w': shape should be a list of sizes"),
    "shape of truths": (entry("w", shape=[2, 4, True]), "array 'w': shape should be a list of sizes"),
    "shape of one axis": (entry("w", shape=[32]), r"array 'w': NMArray: expected a shape \(M, K\)"),
    "shape of four axes": (entry("w", shape=[1, 2, 4, 32]), r"array 'w': NMArray: expected a shape \(M, K\)"),
    "shape of no axes": (entry("w", shape=[]), r"array 'w': NMArray: expected a shape \(M, K\)"),
    "shape with more columns": (entry("w", shape=[2, 4, 64]), "array 'w': .* expected values as bfloat16"),
    "shape with more rows": (entry("w", shape=[2, 5, 32]), "array 'w': .* expected values as bfloat16"),
    "shape with more experts": (entry("w", shape=[3, 4, 32]), "array 'w': .* expected values as bfloat16"),
    "shape without experts": (entry("w", shape=[8, 32]), "array 'w': .* expected values as bfloat16"),
    "shape beyond memory": (entry("w", shape=[2, 4, 2**62]), "array 'w': .* expected values as bfloat16"),
    "unknown dtype": (entry("w", dtype="float8"), "array 'w': unknown dtype 'float8'"),
    "dtype of no float": (entry("w", dtype="int16"), "array 'w': unknown dtype 'int16'"),
    "dtype that the values lack": (entry("w", dtype="float16"), "declared float16, its values are bfloat16"),
    "values missing": (rename("w.values", "w.value"), "array 'w' lacks its buffer 'values'"),
    "meta missing": (rename("w.meta", "w.metas"), "array 'w' lacks its buffer 'meta'"),
    "indices missing in V:N:M": (rename("v.indices", "x"), "array 'v' lacks its buffer 'indices'"),
    "indices missing in Samoyeds": (rename("s.indices", "x"), "array 's' lacks its buffer 'indices'"),
    "sparse and dense of one name": (rename("d", "w"), "'w' names both a sparse array and a dense tensor"),
    "values of another float": (retype("w.values", "F16"), "declared bfloat16, its values are float16"),
    "values of integers": (retype("w.values", "U16"), "declared bfloat16, its values are uint16"),
    "values of no NumPy dtype": (retype("w.values", "F4", [2, 4, 64]), "dtype F4, which NumPy cannot hold"),
    "dense tensor of no NumPy dtype": (retype("d", "F4", [3, 32]), "tensor 'd' has dtype F4, which NumPy cannot hold"),
    "values of another shape": (retype("w.values", "BF16", [2, 16, 4]), "array 'w': .* expected values as bfloat16"),
    "meta of bytes": (retype("w.meta", "U8", [2, 4, 4]), "array 'w': .* expected meta as uint16"),
    "meta signed": (retype("w.meta", "I16"), "array 'w': .* expected meta as uint16"),
    "meta of another shape": (retype("w.meta", "U16", [4, 2, 2]), "array 'w': .* expected meta as uint16"),
    "indices signed": (retype("s.indices", "I8"), "array 's': .* expected indices as uint8"),
    "indices of another shape": (retype("s.indices", "U8", [2, 4]), "array 's': .* expected indices as uint8"),
    "2:4 positions descending": (poke("w.meta", np.uint16, 3, 0x1111), "array 'w': .* positions that do not ascend"),
    "2:4 positions equal": (poke("w.meta", np.uint16, 0, 0x4445), "array 'w': .* positions that do not ascend"),
    "n:m positions descending": (
        poke("g.meta", np.uint8, slice(0, 2), [3, 1]),
        "array 'g': .* positions that do not ascend",
    ),
    "n:m position outside its group": (poke("g.meta", np.uint8, 1, 6), r"array 'g': .* positions outside 0\.\.5"),
    "V:N:M positions descending": (poke("v.meta", np.uint16, 0, 0), "array 'v': .* the buffers are corrupt"),
    "V:N:M columns descending": (
        poke("v.indices", np.uint8, slice(0, 4), [3, 2, 1, 0]),
        "array 'v': .* the buffers are corrupt",
    ),
    "V:N:M columns equal": (
        poke("v.indices", np.uint8, slice(0, 4), [0, 1, 1, 2]),
        "array 'v': .* the buffers are corrupt",
    ),
    "V:N:M column outside its group": (poke("v.indices", np.uint8, 3, 8), "array 'v': .* the buffers are corrupt"),
    "Samoyeds positions descending": (poke("s.meta", np.uint16, 0, 0), "array 's': .* positions that do not ascend"),
    "Samoyeds row outside its group": (poke("s.indices", np.uint8, 2, 3), r"array 's': .* rows outside 0\.\.2"),
    "Samoyeds rows equal": (
        poke("s.indices", np.uint8, slice(0, 4), [1, 1, 1, 1]),
        "array 's': .* rows that do not ascend",
    ),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_and_buffers(path, raw_file, case):
    change, message = METADATA[case]
    change(raw_file(path))
    with pytest.raises(NMSparseError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_the_file_is_cut_while_it_is_read(path):
    checkpoint = Checkpoint(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(NMSparseError, match=r"w\.safetensors: the file ends inside tensor"):
        [checkpoint[name] for name in checkpoint]
