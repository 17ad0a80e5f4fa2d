"""What convert refuses: each way to spoil a checkpoint or a call, and the error; never with anything left behind."""

import os

import ml_dtypes
import numpy as np
import pytest

from nmsparse import NMSparseError
from nmsparse.io import convert, save

E, H, I = 3, 32, 24  # noqa: E741 (as in conftest: experts, hidden size, width of an expert)


# Name -> (how the tensors or the config are changed, what the error says)


def add(name, array):
    return lambda tensors, config: tensors.update({name: array})


def remove(text):
    return lambda tensors, config: [tensors.pop(name) for name in list(tensors) if text in name]


def change(name, function):
    return lambda tensors, config: tensors.update({name: function(tensors[name])})


MIXTRAL = "model.layers.0.block_sparse_moe.experts"
MLP = "model.layers.0.mlp.experts"
BYTES = np.zeros((4, 4), np.uint8)
REFUSED = {
    "no experts": ("mixtral", remove("experts"), "no experts found"),
    "an expert missing": ("mixtral", remove("experts.1."), "expert 1 has no gate matrix"),
    "the last expert missing": ("mixtral", remove("experts.2."), "config.json says 3 experts, the tensors hold 2"),
    "a matrix missing": ("mixtral", remove("experts.2.w3"), "expert 2 has no up matrix"),
    "experts without a gate": ("deepseek", remove("gate_proj"), "expert 0 has no gate matrix"),
    "a matrix of another shape": (
        "mixtral",
        change(f"{MIXTRAL}.1.w2.weight", lambda w: w[1:]),
        r"experts\.1\.w2\.weight: expected shape \(32, 24\), got \(31, 24\)",
    ),
    "a matrix that is none": (
        "mixtral",
        change(f"{MIXTRAL}.0.w1.weight", np.ravel),
        r"expected a matrix, got shape \(768,\)",
    ),
    "two dtypes": (
        "mixtral",
        change(f"{MIXTRAL}.1.w2.weight", lambda w: w.astype(np.float16)),
        r"the experts have several dtypes \(F16, F32\)",
    ),
    "two names of one matrix": (
        "mixtral",
        add(f"{MIXTRAL}.0.gate_proj.weight", np.zeros((I, H), np.float32)),
        "both the gate",
    ),
    "an unknown matrix": ("mixtral", add(f"{MIXTRAL}.0.w4.weight", np.zeros((I, H), np.float32)), "no matrix 'w4'"),
    "a bias per expert": (
        "mixtral",
        add(f"{MIXTRAL}.0.w1.bias", np.zeros(I, np.float32)),
        "with a bias are not supported",
    ),
    "both layouts": (
        "mixtral",
        add(f"{MIXTRAL}.down_proj", np.zeros((E, H, I), np.float32)),
        "both separate and stacked",
    ),
    "no stacked down": ("transformers 5", remove("down_proj"), "has no down_proj"),
    "stacked shapes that do not fit": (
        "transformers 5",
        change(f"{MLP}.down_proj", lambda w: w[:, :, :-1]),
        r"gate_up_proj \(3, 48, 32\) and down_proj \(3, 32, 23\) fit neither",
    ),
    "stacked of other counts": ("transformers 5", change(f"{MLP}.down_proj", lambda w: w[:-1]), "fit neither"),
    "stacked without experts axis": ("transformers 5", change(f"{MLP}.down_proj", lambda w: w[0]), "fit neither"),
    "a stacked bias that does not fit": (
        "transformers 5",
        add(f"{MLP}.down_proj_bias", np.zeros((E, I), np.float32)),
        "expected shape",
    ),
    "transposed, of an unknown model": (
        "gpt-oss",
        lambda tensors, config: config.update(model_type="someone"),
        "for model_type 'someone' it is not known whether the columns of gate and up come in halves or alternate",
    ),
    "fp8 with scales": (
        "deepseek",
        add(f"{MLP}.0.gate_proj.weight_scale_inv", np.ones((1, 1), np.float32)),
        "are quantised",
    ),
    "fp8": (
        "deepseek",
        change(f"{MLP}.0.gate_proj.weight", lambda w: w.astype(ml_dtypes.float8_e4m3fn)),
        r"gate_proj\.weight \(F8_E4M3\): the experts are quantised",
    ),
    "mxfp4": (
        "gpt-oss",
        lambda tensors, config: (
            remove("experts")(tensors, config),
            add(f"{MLP}.gate_up_proj_blocks", BYTES)(tensors, config),
        ),
        r"gate_up_proj_blocks \(U8\): the experts are quantised",
    ),
    "mxfp4 scales": ("gpt-oss", add(f"{MLP}.down_proj_scales", BYTES), "are quantised"),
    "GPTQ": ("deepseek", add(f"{MLP}.0.gate_proj.qweight", np.zeros((4, 4), np.int32)), "are quantised"),
    "bitsandbytes": ("mixtral", change(f"{MIXTRAL}.0.w1.weight", lambda w: w.astype(np.uint8)), "are quantised"),
    "integers": ("transformers 5", change(f"{MLP}.down_proj", lambda w: w.astype(np.int8)), "are quantised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(write_checkpoint, tmp_path, experts, case, layout):
    name, spoil, message = REFUSED[case]
    tensors, config, _ = layout(name, experts)
    spoil(tensors, config)
    source = write_checkpoint({"other": np.ones(1), **tensors}, config)
    with pytest.raises(NMSparseError, match=message):
        convert(source, tmp_path / "out", "2:4")
    assert os.listdir(tmp_path) == [source.name]


def test_refused_by_its_files(write_checkpoint, tmp_path, experts, layout):
    tensors, config, _ = layout("mixtral", experts)
    source = write_checkpoint(tensors, config)
    convert(source, tmp_path / "sparse", "2:4")
    with pytest.raises(NMSparseError, match="is converted already"):
        convert(tmp_path / "sparse", tmp_path / "out", "2:4")
    with pytest.raises(FileExistsError, match="sparse already exists"):
        convert(source, tmp_path / "sparse", "2:4")
    with pytest.raises(NMSparseError, match="dtype: expected one of keep"):
        convert(source, tmp_path / "out", "2:4", dtype="int8")
    with pytest.raises(NMSparseError, match="is not understood"):
        convert(source, tmp_path / "out", "half")
    with pytest.raises(FileNotFoundError, match="no such directory to make 'out' in"):
        convert(source, tmp_path / "nowhere" / "out", "2:4")
    with pytest.raises(FileNotFoundError, match="absent: no such directory"):
        convert(tmp_path / "absent", tmp_path / "out", "2:4")
    with pytest.raises(FileNotFoundError, match="takes a checkpoint directory"):
        convert(source / "model.safetensors", tmp_path / "out", "2:4")
    (source / "config.json").write_text("{")
    with pytest.raises(NMSparseError, match=r"config\.json: is not valid JSON"):
        convert(source, tmp_path / "out", "2:4")
    (source / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        convert(source, tmp_path / "out", "2:4")
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(NMSparseError, match=r"pytorch_model\.bin is a pickled checkpoint"):
        convert(source, tmp_path / "out", "2:4")
    assert sorted(os.listdir(tmp_path)) == ["dense", "sparse"]


def test_values_that_do_not_fit_the_dtype(write_checkpoint, tmp_path, experts, layout):
    experts["down"][1, 2, 3] = 1e6
    tensors, config, _ = layout("mixtral", experts)
    with pytest.raises(NMSparseError, match=r"down_proj, expert 1: weights up to 1000000\.0 do not fit float16"):
        convert(write_checkpoint(tensors, config), tmp_path / "out", "2:4", dtype="float16")
    assert os.listdir(tmp_path) == ["dense"]


def test_a_file_saved_by_hand_is_no_model(tmp_path):
    save(tmp_path / "w.safetensors", {"w": np.ones(2)})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NMSparseError, match="no experts found"):
        convert(tmp_path, tmp_path / "out", "2:4")
