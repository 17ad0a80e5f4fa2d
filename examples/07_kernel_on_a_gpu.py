"""From a naive kernel to the final one in five steps, timed on a GPU; without a GPU they are compiled and inspected.

Run:  python examples/07_kernel_on_a_gpu.py [rows tokens columns]
"""

import sys

import numpy as np

from nmsparse import NMArray, UnsupportedDeviceError
from nmsparse.bench.gpu import kernel_seconds
from nmsparse.cuda import driver, launch
from nmsparse.cuda.choose import H200, Problem, candidates, choose
from nmsparse.cuda.config import GemmConfig
from nmsparse.cuda.config_mma import MmaConfig
from nmsparse.cuda.matmul import matmul

ROWS, TOKENS, COLUMNS = map(int, sys.argv[1:]) if len(sys.argv) > 1 else (4096, 4096, 4096)
PROBLEM = Problem(ROWS, TOKENS, COLUMNS)


def best(config):
    """The config with the best way to deal its tiles."""
    assert not config.problems(), config.problems()
    return min(candidates(config, PROBLEM, H200), key=lambda plan: plan.seconds)


STEPS = {
    "tensor cores: mma.sp, a small tile, two slots": best(MmaConfig(64, 64, 64, warps_m=2, warps_t=2, stages=2)),
    "larger tiles, copies further ahead": best(MmaConfig(128, 128, 64, warps_m=2, warps_t=4, stages=3)),
    "Hopper: wgmma.sp, bulk copies, a producer": best(GemmConfig(tile_t=128, stages=4)),
    "tiles that fill the registers, five slots": best(GemmConfig()),
    "chosen: pairs of CTAs share their tokens": choose(PROBLEM),
}


def naive(values, meta, x, y, columns):
    """One thread computes one output, as the definition says it: no tensor cores, no tiles."""
    row, token = cuda.grid(2)
    if row < y.shape[1] and token < y.shape[0]:
        total = 0.0
        for group in range(columns // 4):
            bits = meta[row, group // 4] >> 4 * (group % 4)
            total += float(values[row, 2 * group]) * float(x[token, 4 * group + (bits & 3)])
            total += float(values[row, 2 * group + 1]) * float(x[token, 4 * group + (bits >> 2 & 3)])
        y[token, row] = total


try:
    driver.current_device()
    import torch
    from numba import cuda
except (UnsupportedDeviceError, ImportError) as reason:
    print(f"no GPU to run on ({reason}); what the compiler says for sm_90a:")
    for name, plan in STEPS.items():
        used = launch.compiled(plan.config, "sm_90a").resources()
        assert used["spill_stores"] == used["stack"] == 0
        print(f"{name:48} {plan.config.name:18} {used['registers']} registers at launch, {plan.config.threads} threads")
    sys.exit()

rng = np.random.default_rng(0)
weight = NMArray.random((ROWS, COLUMNS), dtype=np.float16, rng=rng).to_device("cuda")
x = torch.randn(TOKENS, COLUMNS, device="cuda", dtype=torch.float16)
y = torch.empty(TOKENS, ROWS, device="cuda", dtype=torch.float16)
dense = torch.from_dlpack(weight.todense())
arrays = [cuda.as_cuda_array(a) for a in (torch.from_dlpack(weight.values), x, y)]
meta = cuda.as_cuda_array(torch.from_dlpack(weight.meta).view(torch.int16)).view(np.uint16)
first = cuda.jit(naive)[(-(-ROWS // 32), -(-TOKENS // 8)), (32, 8)]
runs = {"one thread, one output": lambda: first(arrays[0], meta, *arrays[1:], COLUMNS)}
runs |= {name: lambda plan=plan: matmul(x, weight, out=y, config=plan) for name, plan in STEPS.items()}
exact = x[:64].double() @ dense.double().t()
for run in runs.values():
    y.fill_(float("nan"))
    run()
    assert (y[:64].double() - exact).norm() / exact.norm() < 1e-3
runs["cuBLAS, dense"] = lambda: torch.matmul(x, dense.t(), out=y)
for name, seconds in kernel_seconds({name: [run] for name, run in runs.items()}, calls=5).items():
    print(f"{name:48} {seconds * 1e6:10.1f} µs {2 * ROWS * TOKENS * COLUMNS / seconds * 1e-12:7.0f} TFLOP/s eq")
