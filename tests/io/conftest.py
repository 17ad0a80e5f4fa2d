"""Safetensors files and checkpoints written without nmsparse: what is read does not come from what is tested."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

E, H, I = 3, 32, 24  # noqa: E741 (experts, hidden size, width of an expert)


class RawFile:
    """A safetensors file taken apart: the header as a dict, and the bytes behind it."""

    def __init__(self, path):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        self.path, self.header, self.data = path, json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def write(self, header=None, data=None):
        text = json.dumps(self.header).encode() if header is None else header
        self.path.write_bytes(struct.pack("<Q", len(text)) + text + (self.data if data is None else data))

    @property
    def arrays(self):
        return json.loads(self.header["__metadata__"]["nmsparse"])["arrays"]

    def describe(self, **changes):
        """Rewrite the file with other nmsparse metadata."""
        found = json.loads(self.header["__metadata__"]["nmsparse"]) | changes
        self.header["__metadata__"]["nmsparse"] = json.dumps(found)
        self.write()

    def poke(self, tensor, dtype, index, value):
        """Rewrite the file with one element of a tensor changed."""
        begin, end = self.header[tensor]["data_offsets"]
        array = np.frombuffer(self.data[begin:end], dtype).copy()
        array[index] = value
        self.write(data=self.data[:begin] + array.tobytes() + self.data[end:])


@pytest.fixture
def raw_file():
    return RawFile


@pytest.fixture
def write_checkpoint(tmp_path):
    """``write(tensors, config, shards=1)`` -> a new directory in the Hugging Face layout."""

    def write(tensors, config, shards=1, name="dense"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {key: tensors[key] for key in sorted(tensors)[shard::shards]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.fixture
def rng():
    return np.random.default_rng(20240817)


@pytest.fixture
def experts(rng):
    """Gate, up (E, I, H) and down (E, H, I) of one layer."""
    shapes = {"gate": (E, I, H), "up": (E, I, H), "down": (E, H, I)}
    return {role: rng.standard_normal(shape).astype(np.float32) for role, shape in shapes.items()}


def separate(experts, prefix, names):
    return {
        f"{prefix}.{e}.{name}.weight": experts[role][e]
        for role, name in zip(("gate", "up", "down"), names, strict=True)
        for e in range(E)
    }


def stacked(experts):
    return np.concatenate([experts["gate"], experts["up"]], axis=1), experts["down"]


def transposed(weight):
    return np.ascontiguousarray(weight.swapaxes(1, 2))


def alternating(gate_up):
    """Columns gate 0, up 0, gate 1, up 1, … of a transposed (E, H, 2I)."""
    gate, up = np.split(transposed(gate_up), 2, axis=2)
    return np.stack([gate, up], axis=-1).reshape(gate_up.shape[0], H, 2 * I)


def expert_layout(name, experts):
    gate_up, down = stacked(experts)
    if name == "mixtral":
        prefix = "model.layers.0.block_sparse_moe.experts"
        return separate(experts, prefix, ("w1", "w3", "w2")), {"num_local_experts": E}, prefix
    if name == "jamba":
        prefix = "model.layers.0.feed_forward.experts"
        return separate(experts, prefix, ("gate_proj", "up_proj", "down_proj")), {}, prefix
    if name == "llama4":
        prefix = "language_model.model.layers.0.feed_forward.experts"
        tensors = {f"{prefix}.gate_up_proj": transposed(gate_up), f"{prefix}.down_proj": transposed(down)}
        return tensors, {"model_type": "llama4", "text_config": {"num_local_experts": E}}, prefix
    prefix = "model.layers.0.mlp.experts"
    if name == "deepseek":
        tensors = separate(experts, prefix, ("gate_proj", "up_proj", "down_proj"))
        return tensors, {"n_routed_experts": E, "hidden_size": H}, prefix
    if name == "transformers 5":
        return {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down}, {"num_experts": E}, prefix
    if name == "gpt-oss":
        tensors = {f"{prefix}.gate_up_proj": alternating(gate_up), f"{prefix}.down_proj": transposed(down)}
        return tensors, {"model_type": "gpt_oss", "num_local_experts": E, "hidden_size": H}, prefix
    raise AssertionError(name)


@pytest.fixture
def layout():
    """``layout(name, experts)`` -> ``(tensors, config, name of the module)``, as published models keep experts."""
    return expert_layout
