"""The experts of an MoE layer on a GPU: sorted by expert on the device, two products, a CUDA graph for every routing.

Run:  python examples/09_moe_layer_gpu.py
"""

import sys

import numpy as np

import nmsparse
from nmsparse import SparseExperts
from nmsparse.cuda.config_grouped import GroupedConfig
from nmsparse.cuda.config_route import DispatchConfig
from nmsparse.cuda.kernels.route import make_dispatch
from nmsparse.cuda.route import counters
from nmsparse.cuda.tile.cpu import gemv_grouped, route
from nmsparse.moe import Router

TOKENS, EXPERTS, TOP_K, HIDDEN, WIDTH = 48, 8, 2, 256, 384
rng = np.random.default_rng(0)
dense = (rng.standard_normal(shape) / 16 for shape in ((EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)))
gate_up, down = (nmsparse.array(w.astype(np.float16), "samoyeds:1:2:128") for w in dense)
on_cpu = SparseExperts(gate_up, down)
print(on_cpu)


def routing(skew: float):
    """Tokens and what a router says of them; the larger ``skew``, the more tokens the first experts get."""
    logits = rng.standard_normal((TOKENS, EXPERTS), np.float32) - skew * np.arange(EXPERTS, dtype=np.float32)
    ids, weights = Router(TOP_K, renormalize=True)(logits)
    return rng.standard_normal((TOKENS, HIDDEN), np.float32).astype(np.float16), ids.astype(np.int32), weights


# 1. The plan: a launch sorts the (token, choice) slots by expert. Here its text runs on NumPy.
x, ids, weights = routing(0.5)
cfg, tile = DispatchConfig(EXPERTS, TOP_K, threads=64), GroupedConfig(tile_t=16, gather=True, pairs=True)
slots, rows = np.zeros((TOKENS, TOP_K), np.int32), np.zeros(TOKENS * TOP_K, np.int32)
plan, counter = np.zeros((2, EXPERTS), np.int32), np.zeros(counters(EXPERTS), np.int32)
inputs = (np.broadcast_to(array, array.shape) for array in (ids, weights))  # read-only views
memory = *inputs, np.zeros(weights.shape, np.float32), slots, rows, plan, counter, *[None] * 3  # X is not copied
route.launch(make_dispatch, route.make_dispatch, cfg, 1, (*memory, TOKENS, tile.tile_t, HIDDEN, HIDDEN // 8))
ends, tile_ends = plan
print(f"tokens of each expert {np.diff(ends, prepend=0).tolist()}; tiles of {tile.tile_t} end at {tile_ends.tolist()}")
of_position = np.searchsorted(ends, np.arange(len(rows)), side="right")
assert (ids[rows] == of_position[:, None]).any(axis=1).all()

# 2. The schedule: a CTA of the product looks up in the plan what tile it has. Experts without tokens have none.
words, plan, row_tiles = gemv_grouped.plan_words(tile), plan.ravel(), -(-2 * WIDTH // tile.tile_m)
for number in range(0, words["tiles"](plan, EXPERTS, row_tiles), 8):
    expert, row, first, end = words["place"](number, row_tiles, plan, EXPERTS)
    packed, who = row * tile.tile_rows, rows[first : min(first + tile.tile_t, end)].tolist()
    print(f"tile {number:2}: expert {expert}, packed rows from {packed}, {len(who):2} tokens, first {who[:4]}")

# 3. On a GPU: the same class, arrays that are there, and the caller's stream.
try:
    import torch

    if not torch.cuda.is_available():
        raise ImportError("torch sees no GPU")
except ImportError as reason:
    print(f"not run on a GPU: {reason}")
    sys.exit()
on_gpu = SparseExperts(gate_up.to_device("cuda"), down.to_device("cuda"))
x_gpu, ids_gpu, weights_gpu = (torch.from_numpy(array).cuda() for array in (x, ids, weights))


def error(y: torch.Tensor, *call: np.ndarray) -> float:
    """How far the GPU is from the CPU backend, relative to the size of the result."""
    want = on_cpu(*call).astype(np.float32)
    return float(np.linalg.norm(y.float().cpu().numpy() - want) / np.linalg.norm(want))


y = on_gpu(x_gpu, ids_gpu, weights_gpu)
print(f"GPU against CPU: relative error {error(y, x, ids, weights):.1e}")
assert error(y, x, ids, weights) < 2e-3

# 4. Nothing on the host depends on the routing, so one graph serves them all, empty experts included.
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = on_gpu(x_gpu, ids_gpu, weights_gpu)
for skew in (0.0, 0.5, 3.0):
    call = routing(skew)
    for there, here in zip((x_gpu, ids_gpu, weights_gpu), call, strict=True):
        there.copy_(torch.from_numpy(here))
    graph.replay()
    print(f"replayed, tokens {np.bincount(call[1].ravel(), minlength=EXPERTS)}: relative error {error(y, *call):.1e}")
    assert error(y, *call) < 2e-3
