"""The shipped kernels compiled without a GPU: nothing spills, and the machine code is the one that was meant."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from itertools import cycle

import pytest
from kernel_texts import opcodes_of
from machine_code import assert_overlaps, disassembled

from nmsparse.cuda import launch
from nmsparse.cuda.config import SHIPPED, SHIPPED_SAMOYEDS, GemmConfig
from nmsparse.cuda.config_grouped import GroupedConfig
from nmsparse.cuda.layout import BLOCK
from nmsparse.cuda.projection import Projection
from nmsparse.cuda.tile import cpu
from nmsparse.cuda.tile.cpu import grouped as cpu_grouped
from nmsparse.cuda.tile.cpu import samoyeds as cpu_samoyeds

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed", exc_type=ImportError)

from nmsparse.cuda import compiler
from nmsparse.cuda.tile import gpu
from nmsparse.cuda.tile.gpu import grouped as gpu_grouped
from nmsparse.cuda.tile.gpu import samoyeds as gpu_samoyeds

# The largest tile, where registers are tight, and small ones, which compile fast; together every option.
QUICK = [
    SHIPPED[0],
    replace(SHIPPED[-1], dtype="bf16", bias=True),
    GemmConfig(warpgroups=2, blocks=2, tile_t=16, tile_k=128, stages=3, bias=True),
    GemmConfig(warpgroups=1, blocks=2, tile_t=32, stages=3, dtype="bf16"),
]
OTHERS = [replace(cfg, dtype=dtype, bias=True) for cfg, dtype in zip(SHIPPED, cycle(["bf16", "f16"]), strict=False)]
PAIRS = GemmConfig(pairs=True)
QUICK_PAIRS = [replace(PAIRS, tile_t=8, tile_k=128, stages=6, dtype="bf16", bias=True)]
OTHER_PAIRS = [
    replace(PAIRS, tile_t=16, stages=3),
    replace(PAIRS, tile_t=8, stages=3, warpgroups=1),
]
OTHER_PAIRS += [
    replace(cfg, dtype=dtype, bias=True) for cfg, dtype in zip(SHIPPED_SAMOYEDS, cycle(["bf16", "f16"]), strict=False)
]
PLAIN = GroupedConfig(tile_t=16, stages=3)
GATED = replace(PLAIN, gather=True, gated=True, activation="silu")
QUICK_GROUPED = [
    replace(GATED, pairs=True, tile_t=128, tile_k=128, group=16),  # the producer's registers are tightest here
    replace(GATED, tile_t=8, tile_k=128),
    replace(PLAIN, dense=True, tile_t=8, dtype="bf16"),
]
OTHER_GROUPED = [
    replace(PLAIN, pairs=True, activation="relu2", dtype="bf16"),
    replace(PLAIN, warpgroups=1, activation="gelu"),
    replace(GATED, dense=True, activation="gelu_tanh"),
    replace(GATED, pairs=True, tile_t=128, tile_k=128, group=16, part=True),
    replace(GATED, tile_t=128, tile_k=128, group=16, part=True),
    replace(PLAIN, dense=True, tile_t=256, stages=3, group=8, part=True),
]


def projections():
    """What layers ask for: every tile of tokens, at the way in and at the way out."""
    projection = Projection.__new__(Projection)  # the choice hangs on these alone
    projection.letters = "f16"
    for kind, run in (("samoyeds", 128), ("samoyeds", 64), ("2:4", 0), ("dense", 0)):
        projection.kind, projection.run_columns = kind, run
        for gated, activation, gather in ((True, "silu", True), (False, "identity", False)):
            projection.gated, projection.activation = gated, activation
            for tile_t in (8, 16, 32, 64, 96, 128, 160, 192, 256):
                if kind != "samoyeds" or tile_t <= (160 if gather else 192):
                    yield projection.config(tile_t, gather, warpgroups=2 if tile_t > 16 else 1)


def name(cfg):
    shape = f"{cfg.warpgroups}x{cfg.blocks}x{cfg.tile_t}x{cfg.tile_k}-{cfg.stages}-slots"
    kind = f"{'-samoyeds' * cfg.pairs}{'-dense' * getattr(cfg, 'dense', False)}"
    if isinstance(cfg, GroupedConfig):
        return f"grouped{kind}-{shape}-{cfg.dtype}{'-gather' * cfg.gather}{'-gate' * cfg.gated}-{cfg.activation}"
    return f"gemm{kind}-{shape}-{cfg.dtype}{'-bias' * cfg.bias}"


CONFIGS = [pytest.param(cfg, id=name(cfg)) for cfg in QUICK + QUICK_PAIRS + QUICK_GROUPED]
CONFIGS += [
    pytest.param(cfg, id=name(cfg), marks=pytest.mark.slow)
    for cfg in (*OTHERS, *OTHER_PAIRS, *OTHER_GROUPED, *projections())
]
every_config = pytest.mark.parametrize("cfg", CONFIGS)


def expected(cfg):
    """Opcodes that the kernel cannot do without."""
    grouped = isinstance(cfg, GroupedConfig)
    opcodes = {"HGMMA", "SYNCS", "USETMAXREG"}
    if not (grouped and cfg.dense):
        opcodes |= {"UBLKCP"}
    if cfg.clusters:
        opcodes |= {"UCGABAR_ARV", "UCGABAR_WAIT", "STAS"}
    opcodes |= {"LDGSTS", "ARRIVES"} if grouped and cfg.gather else {"UTMALDG"}
    return opcodes | ({"STS", "FFMA", "FADD"} if cfg.pairs else {"STSM"})


@every_config
def test_registers_and_machine_code(cfg, tmp_path):
    assert not cfg.problems()
    kernel = launch.TEXTS[type(cfg)](cfg)
    cubin = compiler.compile_kernel(kernel, cfg.signature, "sm_90a", threads=cfg.threads)
    used = cubin.resources()
    assert (used["spill_stores"], used["spill_loads"], used["stack"]) == (0, 0, 0)
    assert "serialized" not in cubin.log, "ptxas waits after every wgmma: something touches the sums in flight"
    # What ptxas reports is the launch's share; setmaxnreg changes it later.
    assert used["registers"] <= 65536 // cfg.threads // 8 * 8

    code = disassembled(cubin.code, tmp_path)
    opcodes, families = opcodes_of(code)
    assert_overlaps(" ".join(opcodes), isinstance(cfg, GroupedConfig))
    assert not expected(cfg) - set(families), f"expected {expected(cfg)} among {sorted(families)}"
    assert not {"LDL", "STL"} & set(families), "sums in local memory"
    dense = getattr(cfg, "dense", False)
    products = sum(opcode.startswith("HGMMA.SP") != dense for opcode in opcodes if opcode.startswith("HGMMA"))
    step = (4 if dense else 2) * cfg.blocks * cfg.tile_k // BLOCK
    assert products == families["HGMMA"] and products % step == 0
    copies = products // step  # of the loop's body
    # wgmma reads its metadata when it runs, and the group before may still run: each group has registers of its own.
    metadata = re.findall(r"HGMMA\.SP\S+ R\d+, .*?, (R\d+), 0x0", code)
    assert len(metadata) == (0 if dense else products)
    assert dense or cfg.pairs or (len(set(metadata)) == products and copies > 1), f"shared metadata: {metadata}"
    waits = sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes)
    loops = 2 if getattr(cfg, "few", cfg.tile_t) < cfg.tile_t else 1  # of a whole tile, of one with few tokens
    if cfg.pairs:
        assert waits == copies
    else:
        assert waits <= copies + 2 * loops, "more waits than one for each copy of a loop's body, and those at its ends"
    assert families["USETMAXREG"] == 2


VOCABULARIES = [
    *((cpu, gpu, cfg) for cfg in QUICK),
    *((cpu_samoyeds, gpu_samoyeds, cfg) for cfg in QUICK_PAIRS + OTHER_PAIRS),
    *((cpu_grouped, gpu_grouped, cfg) for cfg in QUICK_GROUPED + OTHER_GROUPED),
]


@pytest.mark.parametrize(("twin", "device", "cfg"), [pytest.param(*row, id=name(row[2])) for row in VOCABULARIES])
def test_the_two_vocabularies_are_the_same(twin, device, cfg):
    """Same words, same arguments, on NumPy and on the GPU."""
    on_cpu, on_gpu = vars(twin.make(cfg)), vars(device.make(cfg))
    words = {word for word in on_gpu if not word.startswith("__")}
    assert words == set(on_cpu)
    for word in words - {"PRODUCER", "inline", "accumulator", "token_registers", "await_previous", "begin_next"}:
        arguments = list(inspect.signature(on_gpu[word].py_func).parameters)
        assert ["role", *arguments] == list(inspect.signature(on_cpu[word]).parameters), word
