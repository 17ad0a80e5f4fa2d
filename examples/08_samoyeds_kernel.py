"""The Samoyeds kernel at work: one sum for two outputs, told apart at the ends of runs. On NumPy, then on a GPU.

Run:  python examples/08_samoyeds_kernel.py [rows tokens columns]
"""

import sys
from functools import partial

import numpy as np

import nmsparse
from nmsparse import SamoyedsArray
from nmsparse.cuda.config import GemmConfig
from nmsparse.cuda.kernels.samoyeds import make_samoyeds
from nmsparse.cuda.layout import pack_blocks
from nmsparse.cuda.tile import cpu
from nmsparse.cuda.tile.cpu import samoyeds

ROWS, TOKENS, COLUMNS, V = 128, 16, 512, 128
rng = np.random.default_rng(0)
weight = SamoyedsArray.random((ROWS, COLUMNS), v=V, dtype=np.float16, rng=rng)
x = rng.standard_normal((TOKENS, COLUMNS)).astype(np.float16)

# 1. The format: of two rows, one sub-row of V columns is stored, and `indices` says which: 0 the even, 1 the odd one.
print(f"{ROWS} rows of {COLUMNS} columns are stored as {len(weight.values)} rows of {weight.values.shape[1]} values")
for row in range(3):
    print(f"packed row {row}: picks {weight.indices[row]}, so its runs belong to rows {2 * row + weight.indices[row]}")

# 2. The idea, in NumPy: a packed row is a 2:4 row. Multiply a run as if nothing else were there, then look who owns it.
packed = nmsparse.NMArray.from_buffers(weight.values, weight.meta, shape=(ROWS // 2, COLUMNS)).todense()
sums = [x[:, k : k + V].astype(np.float32) @ packed[:, k : k + V].T for k in range(0, COLUMNS, V)]
y = np.zeros((TOKENS, ROWS // 2, 2), np.float32)
for run, run_sum in enumerate(sums):
    y[:, np.arange(ROWS // 2), weight.indices[:, run]] += run_sum
truth = x.astype(np.float64) @ weight.todense().astype(np.float64).T
assert np.abs(y.reshape(TOKENS, ROWS) - truth).max() < 1e-3

# 3. Summation by parts: keep one sum of all runs, and add it to the even row where the next run is another row's. The
# weights are +1 where an even run ends, -1 where an odd one does, 0 where nothing changes; the odd row is what is left.
weights, so_far = np.diff(weight.indices.astype(int), append=1), np.cumsum(sums, axis=0)
print(f"packed row 0: weights of the sums so far {weights[0].tolist()}")
even = np.einsum("rj,jtr->tr", weights, so_far)
assert np.abs(np.stack([even, so_far[-1] - even], axis=-1) - y).max() < 1e-3

# 4. The kernel's text on NumPy, listened to: what thread 0 holds for packed row 0 and token 0, run by run.
cfg = GemmConfig(warpgroups=1, tile_t=TOKENS, tile_k=128, stages=2, pairs=True)


def overheard(cfg: GemmConfig):
    """The words of the twin, of which ``end_run`` and ``end_runs`` say what they did."""
    tile = samoyeds.make(cfg)

    def say(word, acc, *picks):
        word(acc, *picks)
        total, even = acc.sums[0, [0, cfg.run_sums]]
        print(f"a run of row {int(picks[0][0][0])} ends: sum {total:7.3f}, even {even:7.3f}")

    tile.end_run, tile.end_runs = partial(say, tile.end_run), partial(say, tile.end_runs)
    return tile


out = np.full((TOKENS, ROWS), np.nan, np.float16)
blocks = pack_blocks(weight.values, weight.meta)
sizes = ROWS, TOKENS, ROWS, blocks.shape[1], 0, 1, V // cfg.tile_k, COLUMNS // V
memory = blocks, weight.indices, x, out, None, np.zeros(0, np.float32), np.zeros(0, np.uint32)
cpu.launch(make_samoyeds, cfg, 1, (*memory, *sizes), make=overheard)
print(f"Y[0, 0] {out[0, 0]:.3f} and Y[0, 1] {out[0, 1]:.3f}; in float64 {truth[0, 0]:.3f} and {truth[0, 1]:.3f}")
assert np.abs(out - truth).max() < 0.05

# 5. The same text on a GPU, where there is one.
try:
    import torch

    from nmsparse.bench.gpu import kernel_seconds

    if not torch.cuda.is_available():
        raise ImportError("torch sees no GPU")
except ImportError as reason:
    print(f"not timed: {reason}")
    sys.exit()
rows, tokens, columns = map(int, sys.argv[1:]) if len(sys.argv) > 1 else (4096, 8192, 14336)
dense = torch.randn(rows, columns, device="cuda", dtype=torch.float16)
large = SamoyedsArray.random((rows, columns), v=V, dtype=np.float16, rng=rng).to_device("cuda")
x = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)
exact = x[:64].double() @ torch.from_dlpack(large.todense()).double().t()
assert ((x @ large.T)[:64].double() - exact).norm() / exact.norm() < 1e-3
runs = {"cuBLAS, not pruned": [lambda: torch.matmul(x, dense.t())], f"Samoyeds V={V}": [lambda: x @ large.T]}
for name, seconds in kernel_seconds(runs, calls=5).items():
    print(f"{name:20} {seconds * 1e6:8.1f} µs {2 * rows * tokens * columns / seconds * 1e-12:6.0f} TFLOP/s eq")
