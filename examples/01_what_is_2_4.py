"""What is 2:4? Of every four weights in a row, the two largest stay. This draws it.

Run:  python examples/01_what_is_2_4.py
"""

import numpy as np

import nmsparse


def draw(mask: np.ndarray) -> str:
    """A mask as text: ■ stored, · dropped, a gap after each group of four."""
    rows = ("".join("■" if kept else "·" for kept in row) for row in mask)
    return "\n".join("  " + " ".join(row[c : c + 4] for c in range(0, len(row), 4)) for row in rows)


rng = np.random.default_rng(0)
w = rng.standard_normal((6, 32)).astype(np.float32)

A = nmsparse.array(w, "2:4")
print(A)
print(draw(A.mask()))

# Exactly two of every four: the hardware can count on it, so it multiplies half as often.
assert (A.mask().reshape(6, 8, 4).sum(axis=-1) == 2).all()

# What stays is untouched, and what stays is the larger half: much more than half of the weight's energy.
pruned = A.todense()
assert np.array_equal(pruned[A.mask()], w[A.mask()])
energy = (pruned**2).sum() / (w**2).sum()
print(f"\n2:4 keeps {A.density:.0%} of the numbers and {energy:.0%} of the energy (sum of squares)")
assert energy > 0.75

# Stored: half of the values, and two bits for each of them.
print(f"dense {w.astype(np.float16).nbytes} bytes in fp16, 2:4 {A.astype(np.float16).nbytes} bytes")

# A product with the sparse array is the product with the pruned weight.
x = rng.standard_normal((3, 32)).astype(np.float32)
assert np.allclose(x @ A.T, x @ pruned.T, atol=1e-5)

# Other patterns keep other shares; the same four lines make them.
for pattern in ("1:4", "vnm:2:2:8", "samoyeds:1:2:16"):
    B = nmsparse.array(w, pattern)
    print(f"\n{B}\n{draw(B.mask())}")
