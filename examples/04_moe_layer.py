"""A Mixture-of-Experts layer in 30 lines: weights sparse by pruning, activations sparse by routing.

Run:  python examples/04_moe_layer.py
"""

import numpy as np

import nmsparse
from nmsparse import MoELayer, RaggedTokens, SparseExperts
from nmsparse.moe import Router

TOKENS, EXPERTS, TOP_K, HIDDEN, WIDTH = 64, 8, 2, 256, 384
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1])


gate_up, down = normal(EXPERTS, 2 * WIDTH, HIDDEN), normal(EXPERTS, HIDDEN, WIDTH)
experts = SparseExperts.from_dense(gate_up, down, "samoyeds:1:2:128")
layer = MoELayer(normal(EXPERTS, HIDDEN), experts, Router(TOP_K, renormalize=True))

x = rng.standard_normal((TOKENS, HIDDEN), np.float32)
y = layer(x)
print(layer.experts)

# The routing is the second sparsity: each expert reads its own tokens and no others.
ids, weights = layer.route(x)
tokens = RaggedTokens.from_topk(ids, EXPERTS)
print("tokens of each expert:", tokens.counts.tolist(), "of", TOKENS)

# The truth, written out: for each token the weighted sum of its experts, on the pruned weights.
truth = nmsparse.reference.moe(x, ids, weights, experts.gate_up, experts.down)
assert np.allclose(y, truth, atol=1e-4)
dense_bytes = gate_up.nbytes + down.nbytes
print(f"expert bytes {experts.nbytes} instead of {dense_bytes}, error {np.abs(y - truth).max():.1e}")
