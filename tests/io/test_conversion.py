"""convert: every expert becomes what packing it alone gives, all else is copied, and nothing is left half done."""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nmsparse import NMSparseError, formats
from nmsparse.io import Checkpoint, convert, load

E, H, I = 3, 32, 24  # noqa: E741 (as in conftest: experts, hidden size, width of an expert)
PATTERN = "samoyeds:1:2:16"


@pytest.fixture
def rest(rng):
    return {
        "model.embed_tokens.weight": rng.standard_normal((7, H)).astype(np.float16),
        "model.layers.0.mlp.gate.weight": rng.standard_normal((E, H)).astype(ml_dtypes.bfloat16),
        "model.layers.0.mlp.gate.e_score_correction_bias": rng.standard_normal(E).astype(np.float32),
        "model.layers.0.mlp.shared_experts.gate_proj.weight": rng.standard_normal((I, H)).astype(np.float32),
        "model.layers.1.mlp.down_proj.weight": rng.standard_normal((H, 5)).astype(ml_dtypes.float8_e4m3fn),
        "lm_head.position_ids": np.arange(5)[None],
    }


def stacked(experts):
    return np.concatenate([experts["gate"], experts["up"]], axis=1), experts["down"]


def transposed(weight):
    return np.ascontiguousarray(weight.swapaxes(1, 2))


LAYOUTS = ["mixtral", "jamba", "deepseek", "transformers 5", "llama4", "gpt-oss"]


def assert_experts(target, prefix, experts, pattern, dtype=np.float32):
    for name, dense in zip(("gate_up_proj", "down_proj"), stacked(experts), strict=True):
        array = Checkpoint(target)[f"{prefix}.{name}"]
        assert (array.shape, array.dtype, str(array.pattern)) == (dense.shape, dtype, pattern)
        for e in range(E):
            alone = formats.from_dense(dense[e], pattern).astype(dtype)
            for buffer, value in alone.buffers().items():
                assert np.array_equal(getattr(array[e], buffer), value)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(write_checkpoint, tmp_path, experts, rest, name, shards, layout):
    tensors, config, prefix = layout(name, experts)
    source = write_checkpoint(tensors | rest, config, shards)
    convert(source, tmp_path / "out", PATTERN)
    assert_experts(tmp_path / "out", prefix, experts, PATTERN)
    loaded = load(tmp_path / "out")
    assert set(loaded) == {*rest, f"{prefix}.gate_up_proj", f"{prefix}.down_proj"}
    for key, value in rest.items():
        assert (loaded[key].dtype, loaded[key].shape, loaded[key].tobytes()) == (
            value.dtype,
            value.shape,
            value.tobytes(),
        )


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "vnm:16:2:8", "samoyeds:1:2:16"])
@pytest.mark.parametrize("dtype", ["keep", "float16", "bfloat16"])
def test_patterns_and_dtypes(write_checkpoint, tmp_path, experts, pattern, dtype, layout):
    tensors, config, prefix = layout("mixtral", experts)
    convert(write_checkpoint(tensors, config), tmp_path / "out", pattern, dtype=dtype)
    want = {"keep": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    assert_experts(tmp_path / "out", prefix, experts, pattern, want)


def test_square_experts_are_not_confused(write_checkpoint, tmp_path, rng):
    """With H = 2I, gate_up is square; the shape of down still tells the layouts apart."""
    gate_up, down = rng.standard_normal((2, 16, 16)), rng.standard_normal((2, 16, 8))
    prefix = "model.layers.0.mlp.experts"
    for name, change in (("rows", np.asarray), ("columns", transposed)):
        tensors = {f"{prefix}.gate_up_proj": change(gate_up), f"{prefix}.down_proj": change(down)}
        source = write_checkpoint(tensors, {"model_type": "llama4_text", "hidden_size": 16}, name=name)
        convert(source, tmp_path / f"{name}-out", "2:4")
        found = load(tmp_path / f"{name}-out")
        assert np.array_equal(found[f"{prefix}.gate_up_proj"].todense(), formats.from_dense(gate_up, "2:4").todense())
        assert np.array_equal(found[f"{prefix}.down_proj"].todense(), formats.from_dense(down, "2:4").todense())


def test_biases_follow_their_rows(write_checkpoint, tmp_path, experts, rng, layout):
    tensors, config, prefix = layout("gpt-oss", experts)
    gate, up, down = rng.standard_normal((E, I)), rng.standard_normal((E, I)), rng.standard_normal((E, H))
    tensors[f"{prefix}.gate_up_proj_bias"] = np.stack([gate, up], axis=-1).reshape(E, 2 * I).astype(np.float32)
    tensors[f"{prefix}.down_proj_bias"] = down.astype(np.float32)
    convert(write_checkpoint(tensors, config), tmp_path / "out", "2:4", experts_only=True)
    loaded = load(tmp_path / "out")
    assert np.array_equal(loaded[f"{prefix}.gate_up_proj_bias"], np.concatenate([gate, up], axis=1).astype(np.float32))
    assert np.array_equal(loaded[f"{prefix}.down_proj_bias"], down.astype(np.float32))
    assert len(loaded) == 4


def test_what_is_written(write_checkpoint, tmp_path, experts, rest, layout):
    tensors, config, prefix = layout("deepseek", experts)
    tensors |= {name.replace("layers.0", "layers.10"): value for name, value in tensors.items()}
    source = write_checkpoint(tensors | rest, config, shards=2)
    for name in ("tokenizer.json", "LICENSE", "modeling_x.py", "generation_config.json"):
        (source / name).write_text(name)
    for name in ("pytorch_model.bin", "optimizer.pt", "pytorch_model.bin.index.json"):
        (source / name).write_text(name)
    (source / "onnx").mkdir()
    conversion = convert(source, tmp_path / "out", "2:4")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    shards = [f"nmsparse-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    side = ["LICENSE", "config.json", "generation_config.json", "modeling_x.py", "tokenizer.json"]
    assert files == sorted([*shards, *side, "nmsparse.safetensors.index.json"])
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.pop("nmsparse") == {"schema": 1, "pattern": "2:4", "experts_only": False}
    assert written == config
    index = json.loads((tmp_path / "out" / "nmsparse.safetensors.index.json").read_text())
    assert index["weight_map"]["model.embed_tokens.weight"] == shards[0]
    assert index["weight_map"][f"{prefix}.gate_up_proj.values"] == shards[1]
    assert index["weight_map"]["model.layers.1.mlp.down_proj.weight"] == shards[2]
    assert index["weight_map"]["model.layers.10.mlp.experts.down_proj.meta"] == shards[3]
    stored = {name: value for shard in shards for name, value in Checkpoint(tmp_path / "out" / shard).tensors.items()}
    assert stored.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert [layer.name for layer in conversion.layers] == [prefix, "model.layers.10.mlp.experts"]
    only = convert(source, tmp_path / "only", "2:4", experts_only=True)
    assert set(load(tmp_path / "only")) == {
        f"{layer.name}.{m}" for layer in only.layers for m in ("gate_up_proj", "down_proj")
    }
    assert only.dense_bytes == 0 and conversion.dense_bytes == sum(value.nbytes for value in rest.values())


def test_the_report(write_checkpoint, tmp_path, experts, layout):
    tensors, config, prefix = layout("mixtral", experts)
    started, steps, layers = [], [], []
    conversion = convert(
        write_checkpoint(tensors, config),
        tmp_path / "out",
        "2:4",
        on_start=started.append,
        on_matrix=lambda: steps.append(1),
        on_layer=layers.append,
    )
    (layer,) = conversion.layers
    assert started == [2 * E] and len(steps) == 2 * E and layers == [layer]
    assert (layer.name, layer.experts, layer.gate_up, layer.down) == (prefix, E, (2 * I, H), (H, I))
    assert layer.bytes_before == sum(value.nbytes for value in experts.values())
    loaded = load(tmp_path / "out")
    assert layer.bytes_after == sum(array.nbytes for array in loaded.values())
    lost = size = stored = 0.0
    for name, dense in zip(("gate_up_proj", "down_proj"), stacked(experts), strict=True):
        array = loaded[f"{prefix}.{name}"]
        lost += float(((array.todense() - dense).astype(float) ** 2).sum())
        size += float((dense.astype(float) ** 2).sum())
        stored += array.nnz
    assert layer.error == pytest.approx((lost / size) ** 0.5, rel=1e-9)
    assert layer.density == pytest.approx(stored / sum(value.size for value in experts.values()))
    assert conversion.total.error == pytest.approx(layer.error)
    assert conversion.total.experts == E


def test_what_fits_the_pattern_is_kept_without_error(write_checkpoint, tmp_path, experts, layout):
    pruned = {role: formats.from_dense(weight, "2:4").todense() for role, weight in experts.items()}
    tensors, config, prefix = layout("mixtral", pruned)
    conversion = convert(write_checkpoint(tensors, config), tmp_path / "out", "2:4")
    assert conversion.total.error == 0
    assert np.array_equal(load(tmp_path / "out")[f"{prefix}.down_proj"].todense(), pruned["down"])


def test_weights_that_are_zero_or_not_finite(write_checkpoint, tmp_path, experts, layout):
    tensors, config, _ = layout("mixtral", {role: weight * 0 for role, weight in experts.items()})
    assert convert(write_checkpoint(tensors, config, name="zero"), tmp_path / "a", "2:4").total.error == 0
    experts["down"][0, 0, 0] = np.nan
    tensors, config, prefix = layout("mixtral", experts)
    assert np.isnan(convert(write_checkpoint(tensors, config, name="nan"), tmp_path / "b", "2:4").total.error)
    assert np.isnan(load(tmp_path / "b")[f"{prefix}.down_proj"].todense()[0, 0, 0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_stopped_half_way(write_checkpoint, tmp_path, experts, error, layout):
    tensors, config, _ = layout("mixtral", experts)

    def stop(_):
        assert len(os.listdir(tmp_path)) == 2
        raise error

    with pytest.raises(error):
        convert(write_checkpoint(tensors, config), tmp_path / "out", "2:4", on_layer=stop)
    assert os.listdir(tmp_path) == ["dense"]


def test_the_source_is_cut_meanwhile(write_checkpoint, tmp_path, experts, layout):
    tensors, config, _ = layout("mixtral", experts)
    source = write_checkpoint(tensors, config)
    with pytest.raises(NMSparseError, match="the file ends inside tensor"):
        convert(source, tmp_path / "out", "2:4", on_start=lambda _: os.truncate(source / "model.safetensors", 2000))
    assert os.listdir(tmp_path) == ["dense"]


def peak_memory(function, *arguments):
    """Bytes that Python and NumPy hold at most during a call."""
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def write_layers(folder, layers, size, experts):
    """A checkpoint of separate experts, one shard per layer; returns the bytes of one layer."""
    folder.mkdir()
    weight_map = {}
    for layer in range(layers):
        tensors = {
            f"model.layers.{layer}.mlp.experts.{e}.{matrix}.weight": np.full((size, size), e + 1, np.float32)
            for e in range(experts)
            for matrix in ("gate_proj", "up_proj", "down_proj")
        }
        save_file(tensors, folder / f"{layer}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{layer}.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return 4 * 3 * experts * size * size


def test_memory_does_not_grow_with_the_layers(tmp_path):
    for name, layers in (("few", 2), ("many", 10)):
        layer_bytes = write_layers(tmp_path / name, layers, size=256, experts=8)
    convert(tmp_path / "few", tmp_path / "warm-up", "2:4")
    few = peak_memory(convert, tmp_path / "few", tmp_path / "a", "2:4")
    many = peak_memory(convert, tmp_path / "many", tmp_path / "b", "2:4")
    assert many < 1.3 * few  # five times the layers; a thread that wakes late may hold one matrix longer
    assert many < layer_bytes


def test_dense_tensors_are_not_read_into_memory(tmp_path):
    """What is copied goes from file to file: a tensor far larger than the experts costs no memory of its own."""
    folder = tmp_path / "dense"
    folder.mkdir()
    prefix = "model.layers.0.mlp.experts"
    tensors = {f"{prefix}.0.{m}.weight": np.ones((64, 64), np.float32) for m in ("gate_proj", "up_proj", "down_proj")}
    tensors["model.embed_tokens.weight"] = np.arange(1 << 22, dtype=np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    convert(folder, tmp_path / "warm-up", "2:4")
    assert peak_memory(convert, folder, tmp_path / "out", "2:4") < 1 << 20
    (shard,) = (tmp_path / "out").glob("nmsparse-00001-*")
    assert np.array_equal(load_file(shard)["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
