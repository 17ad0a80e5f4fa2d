"""Who holds what: the registers of a sparse tensor-core instruction, drawn from the library's integer functions.

Run:  python examples/05_fragments.py
"""

import numpy as np

from nmsparse.formats import fragments, metadata

LANES = np.arange(32)

# D[m, n] += sum over k of A[m, k] * B[k, n], m16n8k32: 16 rows of weights, 8 tokens, 32 columns of which A stores 16.
owner_a, owner_d = np.empty((16, 16), object), np.empty((16, 8), object)
for register in range(4):
    for half in range(2):
        rows, columns = fragments.mma_sp_a(LANES, register, half)
        owner_a[rows, columns] = [f"{lane:2d}.{register}" for lane in LANES]
    rows, columns = fragments.mma_sp_d(LANES, register)
    owner_d[rows, columns] = [f"{lane:2d}.{register}" for lane in LANES]

print("A, stored 16 x 16: lane.register of each pair of columns")
for row in owner_a[:, ::2]:
    print("  ", *row)
print("D, 16 x 8: lane.register")
for row in owner_d:
    print("  ", *row)
assert (owner_a != None).all() and (owner_d != None).all()  # noqa: E711  (every place has an owner)

# The metadata register of lane 4g + F: low half row g, high half row g + 8, the dense columns 16F..16F+15.
print("metadata: lane of each row's two words (16 columns each), low or high half of its register")
words = np.empty((16, 2), object)
for half in range(2):
    rows, word = fragments.mma_sp_meta(fragments.meta_lanes(0), half)
    words[rows, word] = [f"{lane:2d}{'lh'[half]}" for lane in fragments.meta_lanes(0)]
for row in words:
    print("  ", *row)

# The same thing computed: put random numbers where the maps say and multiply what each lane holds.
rng = np.random.default_rng(0)
stored, b = rng.standard_normal((16, 16)), rng.standard_normal((32, 8))
kept = np.sort(np.argsort(rng.random((16, 8, 4)))[..., :2])
dense = np.zeros((16, 8, 4))
np.put_along_axis(dense, kept, stored.reshape(16, 8, 2), axis=2)
canonical = metadata.pack(kept)
d = np.zeros((16, 8))
for lane in LANES:
    for register in range(4):
        m, n = fragments.mma_sp_d(lane, register)
        positions = metadata.unpack(canonical[m])
        columns = (4 * np.arange(8)[:, None] + positions).ravel()
        d[m, n] = stored[m] @ b[columns, n]
assert np.allclose(d, dense.reshape(16, 32) @ b)
print(f"32 lanes x 4 registers hold all {d.size} results; the product of the decoded A agrees")
