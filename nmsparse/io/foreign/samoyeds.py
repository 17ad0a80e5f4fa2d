"""The buffers of the Samoyeds kernels themselves (guqiqi/Samoyeds-Kernel, ``format_ss``).

R = M·n/m kept rows of K columns, as in :class:`~nmsparse.formats.SamoyedsArray`, but: indices are uint32 and stored
transposed, metadata is uint32 with 16 positions a word, and of the two orders of metadata the one that is uploaded
("uint load") has blocks exchanged, so that a thread fetches the two rows that it needs with one load.
"""

from __future__ import annotations

import numpy as np

from ...formats import SamoyedsArray
from .expect import expect, expect_multiples


def from_samoyeds_kernel(
    value: np.ndarray,
    indices: np.ndarray,
    metadata: np.ndarray,
    shape: tuple[int, int],
    *,
    n: int = 1,
    m: int = 2,
    v: int = 128,
    exchanged: bool = True,
) -> SamoyedsArray:
    """The array of ``value`` (R, K/2), ``indices`` uint32 (K/v, R) and ``metadata`` uint32 (R, K/32).

    ``exchanged`` says that the metadata is in the order for "uint load" (``metadata_uint_load``); False is the plain
    order ("short load"), which is also what the Python ``sparsifier`` of that project writes. M is a multiple of 16·m/n
    (of m in plain order), K of v and 32. Raises :class:`~nmsparse.errors.NMSparseError` for what does not fit.
    """
    who = "from_samoyeds_kernel"
    rows, columns = expect_multiples(who, shape, m, np.lcm(v, 32))
    stored = rows // m * n
    if exchanged:
        expect_multiples(who, (stored, columns), 16, 32)
    values = expect(who, "value", value, (stored, columns // 2))
    which = expect(who, "indices", indices, (columns // v, stored), np.uint32, np.int32)
    words = expect(who, "metadata", metadata, (stored, columns // 32), np.uint32, np.int32)
    halves = words.view("<u2").reshape(stored, columns // 32, 2)  # 8 of the 16 positions each
    if exchanged:
        # Of 16 rows x 16 positions, the 8 x 8 at the top right and at the bottom left have changed places.
        blocks = halves.reshape(stored // 16, 2, 8, columns // 32, 2)
        halves = blocks.transpose(0, 4, 2, 3, 1).reshape(halves.shape)
    meta = halves.reshape(stored, columns // 16).astype(np.uint16)
    small = np.minimum(which.T, 255).astype(np.uint8)  # beyond m - 1 is refused below
    return SamoyedsArray.from_buffers(values, meta, small, shape=(rows, columns), n=n, m=m, v=v)
