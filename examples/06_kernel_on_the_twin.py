"""The text of the Hopper kernel, run on NumPy: a Python thread for each warpgroup, real barriers, what they catch.

Run:  python examples/06_kernel_on_the_twin.py
"""

import inspect

import numpy as np

import nmsparse
from nmsparse.cuda.config import GemmConfig
from nmsparse.cuda.kernels import gemm
from nmsparse.cuda.layout import pack_blocks
from nmsparse.cuda.tile import cpu

ROWS, TOKENS, COLUMNS, CTAS = 150, 40, 256, 3
cfg = GemmConfig(warpgroups=2, tile_t=16, stages=2)
rng = np.random.default_rng(0)
weight = nmsparse.NMArray.from_dense(rng.standard_normal((ROWS, COLUMNS)).astype(np.float16))
x = rng.standard_normal((TOKENS, COLUMNS)).astype(np.float16)
blocks = pack_blocks(weight.values, weight.meta)
truth = x.astype(np.float64) @ weight.todense().astype(np.float64).T

print(inspect.getsource(gemm.make_gemm))


def launch(make_kernel) -> float:
    """Largest error of ``make_kernel``'s product, one of its six tiles split along k into three parts."""
    y = np.full((TOKENS, ROWS), np.nan, np.float16)
    partial, flags = np.zeros(CTAS * 2 * cfg.sums * 128, np.float32), np.zeros(CTAS * 2, np.uint32)
    sizes = ROWS, TOKENS, ROWS, blocks.shape[1], 1, 3
    cpu.launch(make_kernel, cfg, CTAS, (blocks, x, y, None, partial, flags, *sizes))
    return float(np.abs(y - truth).max())


error = launch(gemm.make_gemm)
print(f"the text as it is: largest error {error:.4f} of results up to {np.abs(truth).max():.0f}")
assert error < 0.05

MISTAKES = {
    "nobody waits for the copies": ("tile.wait_full(ring, turn)", "pass"),
    "slots are not given back": ("tile.release(ring, turn - 1)\n                    turn", "turn"),
    "the tokens of the next step": ("x_gmem, token, step)", "x_gmem, token, step + 1)"),
    "sums are stored before they are there": ("tile.wait_wgmma()", "pass"),
}
source = inspect.getsource(gemm)
for mistake, (right, wrong) in MISTAKES.items():
    assert right in source, mistake
    names: dict = {}
    exec(source.replace(right, wrong), names)
    try:
        found = f"wrong by {launch(names['make_gemm']):.1f}"
        assert not found.startswith("wrong by 0.0")
    except cpu.KernelError as problem:
        found = " ".join(str(problem).split())[:150]
    print(f"{mistake}: {found}")
