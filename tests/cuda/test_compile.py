"""The shipped kernels compiled without a GPU: nothing spills, and the machine code is the one that was meant."""

from __future__ import annotations

import inspect
import re
import subprocess
from collections import Counter
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest

from nmsparse.cuda.config import SHIPPED, GemmConfig
from nmsparse.cuda.kernels.gemm import make_gemm
from nmsparse.cuda.launch import GEMM_SIGNATURE
from nmsparse.cuda.layout import BLOCK
from nmsparse.cuda.tile import cpu

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed", exc_type=ImportError)

from nmsparse.cuda import compiler
from nmsparse.cuda.tile import gpu

# The largest tile, where registers are tight, and small ones, which compile fast; together every option.
QUICK = [
    SHIPPED[0],
    replace(SHIPPED[-1], dtype="bf16", bias=True),
    GemmConfig(warpgroups=2, blocks=2, tile_t=16, tile_k=128, stages=3, cluster=2, bias=True),
    GemmConfig(warpgroups=1, blocks=2, tile_t=32, stages=3, dtype="bf16"),
]
OTHERS = [replace(cfg, dtype=dtype, bias=True) for cfg, dtype in zip(SHIPPED, cycle(["bf16", "f16"]), strict=False)]


def name(cfg):
    shape = f"{cfg.warpgroups}x{cfg.blocks}x{cfg.tile_t}x{cfg.tile_k}"
    return f"{shape}-{cfg.dtype}{'-bias' * cfg.bias}-cluster{cfg.cluster}"


CONFIGS = [pytest.param(cfg, id=name(cfg)) for cfg in QUICK]
CONFIGS += [pytest.param(cfg, id=name(cfg), marks=pytest.mark.slow) for cfg in OTHERS]
every_config = pytest.mark.parametrize("cfg", CONFIGS)


def disassembled(cubin, folder):
    """Opcodes of the machine code, in order."""
    nvdisasm = Path(compiler.ptxas()).with_name("nvdisasm")
    if not nvdisasm.is_file():
        pytest.skip(f"no nvdisasm beside {compiler.ptxas()}; install it with: pip install nvidia-cuda-nvdisasm")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin.code)
    text = subprocess.run([nvdisasm, "-c", path], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, flags=re.M)


@every_config
def test_registers_and_machine_code(cfg, tmp_path):
    assert not cfg.problems()
    cubin = compiler.compile_kernel(make_gemm(gpu.make(cfg), cfg), GEMM_SIGNATURE, "sm_90a", threads=cfg.threads)
    used = cubin.resources()
    assert (used["spill_stores"], used["spill_loads"], used["stack"]) == (0, 0, 0)
    assert "serialized" not in cubin.log, "ptxas waits after every wgmma: something touches the sums in flight"
    # What ptxas reports is the launch's share; setmaxnreg changes it later.
    assert used["registers"] <= 65536 // cfg.threads // 8 * 8

    opcodes = disassembled(cubin, tmp_path)
    families = Counter(opcode.split(".")[0] for opcode in opcodes)
    missing = {"HGMMA", "UTMALDG", "UBLKCP", "SYNCS", "USETMAXREG", "STSM"} - set(families)
    assert not missing, f"expected {missing} among {sorted(families)}"
    assert not {"LDL", "STL"} & set(families), "sums in local memory"
    products = sum(opcode.startswith("HGMMA.SP") for opcode in opcodes)
    step = 2 * cfg.blocks * cfg.tile_k // BLOCK
    assert products == families["HGMMA"] and products % step == 0
    waits = sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes)
    assert waits <= products // step + 2, "more waits than one for each copy of the loop's body, and those at its ends"
    assert families["USETMAXREG"] == 2


def test_the_two_vocabularies_are_the_same():
    """Same words, same arguments, on NumPy and on the GPU."""
    for cfg in QUICK:
        on_cpu, on_gpu = (vars(make(cfg)) for make in (cpu.make, gpu.make))
        words = {word for word in on_gpu if not word.startswith("__")}
        assert words == set(on_cpu)
        for word in words - {"PRODUCER", "accumulator"}:
            arguments = list(inspect.signature(on_gpu[word].py_func).parameters)
            assert ["role", *arguments] == list(inspect.signature(on_cpu[word]).parameters), word
