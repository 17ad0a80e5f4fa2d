"""The command line as a shell sees it: exit codes, what goes to stdout and what to stderr."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nmsparse
from nmsparse import formats
from nmsparse.__main__ import COMMANDS, main
from nmsparse.io import load, save

MODEL = Path(__file__).parents[2] / "examples" / "tiny-moe"
EXPERTS = "model.layers.0.block_sparse_moe.experts"


def shell(*arguments, code=None, **options):
    """Run ``python -m nmsparse`` or, with ``code``, that code before its main."""
    if code is None:
        command = [sys.executable, "-m", "nmsparse", *map(str, arguments)]
    else:
        code += "\nimport sys; from nmsparse.__main__ import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def assert_refused(run, *words):
    assert run.returncode == 2, run
    assert "Traceback" not in run.stderr
    for word in words:
        assert str(word) in run.stderr
    assert run.stdout == ""


@pytest.fixture
def model(tmp_path):
    """A checkpoint of one layer and two experts, in the names of Mixtral."""
    source = tmp_path / "dense"
    source.mkdir()
    tensors = {
        f"{EXPERTS}.{e}.{name}.weight": np.random.default_rng(e).standard_normal(shape).astype(np.float16)
        for e in range(2)
        for name, shape in (("w1", (16, 32)), ("w2", (32, 16)), ("w3", (16, 32)))
    }
    save(source / "model.safetensors", tensors | {"model.norm.weight": np.ones(32, np.float16)})
    (source / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 2}')
    return source


# usage


def test_version():
    run = shell("--version")
    assert (run.returncode, run.stdout.strip()) == (0, f"nmsparse {nmsparse.__version__}")


def test_help_names_every_command():
    run = shell("--help")
    assert run.returncode == 0
    for command, (_, summary) in COMMANDS.items():
        assert command in run.stdout and summary in run.stdout


@pytest.mark.parametrize("command", ["info", "convert", "inspect"])
def test_help_of_a_command(command):
    run = shell(command, "--help")
    assert run.returncode == 0
    assert run.stdout.startswith(f"usage: nmsparse {command}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["squash"], "invalid choice: 'squash'"),
        (["--fast"], "COMMAND"),
        (["inspect"], "the following arguments are required: FILE|DIR"),
        (["inspect", "x", "--loud"], "unrecognized arguments: --loud"),
        (["convert", "a", "b"], "the following arguments are required: --pattern"),
        (["convert", "a", "--pattern", "2:4"], "the following arguments are required: OUT"),
        (["convert", "a", "b", "--pattern", "2/4"], "pattern '2/4' is not understood: expected 'n:m'"),
        (["convert", "a", "b", "--pattern", "2:4", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(arguments, message):
    assert_refused(shell(*arguments), message)


def test_only_the_chosen_command_is_imported():
    run = shell(
        code="import sys; sys.argv = ['nmsparse', 'inspect', '--help']\nimport atexit\n"
        "atexit.register(lambda: print(sorted(m for m in sys.modules if m.startswith('nmsparse.cli'))))"
    )
    assert "['nmsparse.cli', 'nmsparse.cli.inspect', 'nmsparse.cli.text']" in run.stdout


# inspect


@pytest.fixture
def saved(tmp_path):
    arrays = {"w": formats.random((2, 8, 32), "2:4", rng=0), "norm": np.ones(32, np.float16), "scale": np.float32(2)}
    return save(tmp_path / "w.safetensors", arrays, {"origin": "a test"})


def test_inspect(saved, capsys):
    assert main(["inspect", str(saved)]) == 0
    header, *rows, _, sparse, dense, both = capsys.readouterr().out.splitlines()
    assert header.split() == ["array", "pattern", "dtype", "shape", "density", "size"]
    assert sorted(row.split() for row in rows) == [
        ["norm", "dense", "float16", "32", "100.0%", "64", "B"],
        ["scale", "dense", "float32", "-", "100.0%", "4", "B"],
        ["w", "2:4", "float32", "2x8x32", "50.0%", "1.1", "kB"],
    ]
    assert (sparse, dense, both) == ("sparse: 1 arrays, 1.1 kB", "dense:  2 arrays, 68 B", "all:    3 arrays, 1.2 kB")


def test_inspect_json(saved, capsys):
    assert main(["inspect", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"] == {"origin": "a test"}
    assert found["total"] == {"arrays": 3, "sparse": 1, "nbytes": 1024 + 64 + 64 + 4}
    (w,) = [array for array in found["arrays"] if array["pattern"]]
    assert w == {
        **{"name": "w", "pattern": "2:4", "format": "nm", "dtype": "float32", "shape": [2, 8, 32]},
        **{"nbytes": 1088, "stored": 256, "density": 0.5},
    }


def test_inspect_check(saved, capsys):
    assert main(["inspect", str(saved), "--check"]) == 0
    assert capsys.readouterr().out.endswith("checked: all 3 arrays are well formed\n")
    raw = saved.read_bytes()
    meta = load(saved)["w"].meta.tobytes()
    saved.write_bytes(raw.replace(meta, bytes(len(meta))))
    assert main(["inspect", str(saved)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(saved), "--check"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"nmsparse: {saved}: array 'w': ")


def test_inspect_the_example():
    run = shell("inspect", MODEL)
    assert run.returncode == 0
    assert f"{EXPERTS}.0.w1.weight" in run.stdout and "384x256" in run.stdout
    assert run.stdout.splitlines()[-1].startswith("all:")


def test_inspect_refusals(tmp_path):
    assert_refused(shell("inspect", tmp_path / "none"), tmp_path / "none", "no such file")
    assert_refused(shell("inspect", tmp_path), tmp_path, "holds no safetensors checkpoint")
    (tmp_path / "x.safetensors").write_text("text")
    assert_refused(shell("inspect", tmp_path / "x.safetensors"), "x.safetensors", "not a safetensors file")


def test_a_reader_that_goes_away(saved):
    command = f"{sys.executable} -m nmsparse inspect {MODEL} --json | head -n 1"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "{\n", "")


# convert


def test_convert_the_example(tmp_path):
    run = shell("convert", MODEL, tmp_path / "out", "--pattern", "2:4")
    assert (run.returncode, run.stderr) == (0, ""), run
    lines = run.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [EXPERTS.replace("0", str(layer)) for layer in range(3)]
    for line in lines[:3]:
        assert "8 experts, gate_up 768x256, down 256x384, density 50.0%, 4.7 MB -> 2.7 MB, relative error 0." in line
    assert lines[3].startswith("total: 24 experts in 3 layers, density 50.0%, 14.2 MB -> 8.0 MB")
    assert shell("inspect", tmp_path / "out", "--check").returncode == 0
    dense, sparse = load(MODEL), load(tmp_path / "out")
    for layer in range(3):
        prefix = EXPERTS.replace("0", str(layer))
        for e in (0, 7):
            gate, down, up = (dense[f"{prefix}.{e}.w{n}.weight"] for n in (1, 2, 3))
            for name, weight in (("gate_up_proj", np.concatenate([gate, up])), ("down_proj", down)):
                want = nmsparse.array(weight, "2:4")
                found = sparse[f"{prefix}.{name}"][e]
                assert found.values.tobytes() == want.values.tobytes()
                assert np.array_equal(found.meta, want.meta)
    rest = [name for name in dense if ".experts." not in name]
    assert len(sparse) == 6 + len(rest)
    for name in rest:
        assert sparse[name].tobytes() == dense[name].tobytes()


def test_convert_quietly_and_refuse_to_overwrite(model, tmp_path):
    arguments = ("convert", model, tmp_path / "out", "--pattern", "samoyeds:1:2:16", "--quiet", "--experts-only")
    run = shell(*arguments)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert set(load(tmp_path / "out")) == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert_refused(shell(*arguments), tmp_path / "out", "already exists")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_convert_dtype(model, tmp_path, capsys):
    assert main(["convert", str(model), str(tmp_path / "out"), "--pattern", "2:4", "--dtype", "bfloat16"]) == 0
    assert load(tmp_path / "out")[f"{EXPERTS}.down_proj"].dtype.name == "bfloat16"
    assert "everything else: copied as it is, 64 B" in capsys.readouterr().out


def test_convert_shows_a_bar_on_a_terminal_only(model, tmp_path):
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-m", "nmsparse", "convert", str(model), str(tmp_path / "out"), "--pattern", "2:4"]
    run = subprocess.run(command, stderr=theirs, stdout=subprocess.PIPE, text=True, check=True)
    os.set_blocking(ours, False)
    assert b"0/4 [" in os.read(ours, 1 << 16)
    os.close(theirs)
    os.close(ours)
    assert run.stdout.startswith(EXPERTS)


def test_convert_stopped_by_ctrl_c(model, tmp_path):
    """A real SIGINT in the middle of the writing."""
    code = (
        "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it behind &\n"
        "from nmsparse.io import conversion\nwrite = conversion.write_file\n"
        "def write_and_stop(*arguments):\n    write(*arguments)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "conversion.write_file = write_and_stop"
    )
    run = shell("convert", model, tmp_path / "out", "--pattern", "2:4", code=code)
    assert (run.returncode, run.stderr.strip()) == (130, "nmsparse: stopped")
    assert os.listdir(tmp_path) == ["dense"]


def test_an_unexpected_error_keeps_its_traceback(model, tmp_path):
    code = "from nmsparse.io import conversion\nconversion.write_file = lambda *arguments: 1 / 0"
    run = shell("convert", model, tmp_path / "out", "--pattern", "2:4", code=code)
    assert run.returncode == 1
    assert "Traceback" in run.stderr and "ZeroDivisionError" in run.stderr
    assert os.listdir(tmp_path) == ["dense"]


def test_a_full_disk_is_no_traceback(model, tmp_path):
    code = (
        "import safetensors\ndef full(*arguments, **options):\n"
        "    raise safetensors.SafetensorError('No space left on device')\nsafetensors.serialize_file = full"
    )
    assert_refused(shell("convert", model, tmp_path / "out", "--pattern", "2:4", code=code), "No space left on device")
    assert os.listdir(tmp_path) == ["dense"]


def test_convert_without_safetensors(model, tmp_path):
    run = shell(
        "convert", model, tmp_path / "out", "--pattern", "2:4", code="import sys; sys.modules['safetensors'] = None"
    )
    assert_refused(run, "pip install 'nmsparse[hf]'")


def test_the_console_script_is_declared():
    setup = (Path(__file__).parents[2] / "setup.cfg").read_text()
    assert "nmsparse = nmsparse.__main__:main" in setup
