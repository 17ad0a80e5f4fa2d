"""The two metadata bits: how the hardware knows which two of four were kept.

Run:  python examples/02_metadata_bits.py
"""

import numpy as np

import nmsparse
from nmsparse.formats import metadata

w = np.array([[0, 7, 0, -6, 8, 0, 0, 9, 0, 0, 4, -3, 5, 6, 0, 0]], np.float32)
A = nmsparse.array(w, "2:4", strict=True)  # strict: w is 2:4 already, nothing may be lost

print("dense   ", w[0].astype(int).tolist())
print("values  ", A.values[0].astype(int).tolist())

# One 16-bit word describes 16 columns: four groups of four bits, the first group in the low bits. In a group, the low
# two bits say where the first value sits, the high two bits where the second does; they always ascend.
word = int(A.meta[0, 0])
print(f"meta     0b{word:016b} = 0x{word:04x}\n")
for group in range(4):
    nibble = word >> 4 * group & 0b1111
    first, second = nibble & 0b11, nibble >> 2
    values = A.values[0, 2 * group : 2 * group + 2].astype(int)
    print(f"group {group}: bits {nibble:04b}, {values[0]:2d} at position {first}, {values[1]:2d} at position {second}")
    assert w[0, 4 * group + first] == values[0] and w[0, 4 * group + second] == values[1]

# Decoding by hand gives the dense row back.
positions = metadata.unpack(A.meta)[0]  # (groups, 2)
columns = 4 * np.arange(4)[:, None] + positions
decoded = np.zeros(16, np.float32)
decoded[columns.ravel()] = A.values[0]
assert np.array_equal(decoded, w[0])

# Six pairs of positions are legal; a word that says anything else is refused, not multiplied.
legal = [pair for pair in range(16) if pair & 3 < pair >> 2]
print("\nlegal groups:", ", ".join(f"{pair:04b}" for pair in legal))
try:
    nmsparse.NMArray.from_buffers(A.values, np.zeros_like(A.meta), shape=A.shape)
except nmsparse.NMSparseError as error:
    print("meta of zeros:", error)
else:
    raise AssertionError("the word 0 names column 0 twice")
