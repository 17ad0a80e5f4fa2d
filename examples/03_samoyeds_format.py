"""The Samoyeds format step by step: drop whole sub-rows, then 2:4 inside what is left.

Run:  python examples/03_samoyeds_format.py
"""

import numpy as np

import nmsparse

N, M, V = 1, 2, 8  # of every 2 rows keep 1 per run of 8 columns (real models: runs of 128)


def draw(mask: np.ndarray) -> str:
    """A mask as text, with a gap at every V columns and a line at every M rows."""
    lines = []
    for r, row in enumerate(mask):
        text = "".join("■" if kept else "·" for kept in row)
        lines.append("  " + " ".join(text[c : c + V] for c in range(0, len(text), V)))
        if r % M == M - 1:
            lines.append("")
    return "\n".join(lines)


rng = np.random.default_rng(4)
w = rng.standard_normal((6, 32)).astype(np.float32)
A = nmsparse.array(w, f"samoyeds:{N}:{M}:{V}")

# Step 1. The second level first: the 2:4 mask of the whole weight. It decides what each sub-row is worth.
two_four = nmsparse.array(w, "2:4").mask()
print(f"step 1: 2:4 everywhere\n{draw(two_four)}")

# Step 2. A sub-row is worth the magnitudes that 2:4 leaves it; of every M rows the best N stay, chunk by chunk.
worth = np.where(two_four, np.abs(w), 0).reshape(6 // M, M, 32 // V, V).sum(axis=-1)
winner = worth.argmax(axis=1)  # (row group, chunk)
print("step 2: worth of each sub-row\n", worth.round(1).reshape(6, -1), "\n        winners", winner.tolist(), "\n")
assert np.array_equal(A.indices, winner)

# Step 3. What is left: one row of every two, two columns of every four. A quarter of the weight.
print(f"step 3: the mask of {A}\n{draw(A.mask())}")
rows = np.arange(M)[None, :, None, None] == winner[:, None, :, None]
assert np.array_equal(A.mask(), two_four & np.broadcast_to(rows, (6 // M, M, 32 // V, V)).reshape(6, 32))
assert A.mask().mean() == 0.25

# Step 4. The kept sub-rows slide together: 6 rows become 3 stored rows, a plain 2:4 matrix for the tensor cores.
print(f"step 4: stored as values {A.values.shape}, meta {A.meta.shape} uint16, indices {A.indices.shape} uint8")

# Step 5. A product walks the stored rows; at each run of V columns the result goes to the row that the index names.
x = rng.standard_normal(32).astype(np.float32)
y = np.zeros(6, np.float32)
stored = nmsparse.NMArray.from_buffers(A.values, A.meta, shape=(3, 32)).todense()
for r in range(3):
    for c in range(32 // V):
        run = slice(c * V, c * V + V)
        y[M * r + A.indices[r, c]] += stored[r, run] @ x[run]
assert np.allclose(y, A @ x, atol=1e-5) and np.allclose(y, A.todense() @ x, atol=1e-5)

bits = 8 * nmsparse.random((256, 4096), "samoyeds:1:2:128", dtype=np.float16, rng=0).nbytes / (256 * 4096)
print(f"\nsamoyeds:1:2:128 in fp16 takes {bits:.3f} bits per weight: {16 / bits:.2f} times less than dense")
