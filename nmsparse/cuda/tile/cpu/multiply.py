"""What ``wgmma.sp.m64nNk32`` and ``wgmma.m64nNk16`` compute from the bytes of a slot, by lanes where lanes matter."""

from __future__ import annotations

import numpy as np

from ....formats import fragments, metadata
from ...layout import VALUE_BYTES, meta_offset

__all__ = ["add_to_registers", "dense_product", "metadata_registers", "of_registers", "sparse_product"]

THREAD = np.arange(fragments.WARPGROUP)
READ = THREAD[np.isin(THREAD % fragments.LANES, fragments.meta_lanes(0))]  # threads whose metadata register counts
ROW, STORED = np.ogrid[:64, :16]
CHUNK_BYTES = 16


def metadata_registers(blocks: np.ndarray) -> np.ndarray:
    """What each thread loads from packed ``blocks (..., BLOCK_BYTES)``: uint32 ``(..., 2, 128)``, one for each k32."""
    row, word = fragments.wgmma_sp_meta(THREAD, 0)
    offset = np.stack([meta_offset(row, word), meta_offset(row, 2 + word)])
    return blocks.view(np.uint32)[..., offset // 4]


def sparse_product(
    tokens: np.ndarray, block: np.ndarray, registers: np.ndarray, half: int, dtype: np.dtype
) -> np.ndarray:
    """``D[m, n] = Σ_k A[m, k] · B[n, k]`` of one k32 instruction, float32 ``(64, N)``.

    ``tokens``: bytes of B, N swizzled rows of 128; ``block``: bytes of the packed block; ``registers``: metadata of the
    128 threads; ``half``: which 32 of the 64 columns. Columns that the metadata does not name are not multiplied, so a
    NaN there does not spread. Metadata that is not ascending is undefined on the hardware: NaN.
    """
    offset = fragments.core_matrix(ROW, STORED + 16 * half, leading=64, stride=256)
    values = block[:VALUE_BYTES].view(dtype)[offset].astype(np.float32)
    words = np.empty((64, 2), np.uint16)
    for high in (0, 1):
        words[fragments.wgmma_sp_meta(READ, high)] = registers[READ] >> 16 * high & 0xFFFF
    positions = metadata.unpack(words)
    ascending = positions[..., 0] < positions[..., 1]
    values[~np.repeat(ascending, 2, axis=1)] = np.nan
    columns = (4 * np.arange(8)[:, None] + positions).reshape(64, 16)

    b = _unswizzled(tokens, dtype)[:, 32 * half : 32 * half + 32]
    with np.errstate(invalid="ignore", over="ignore"):
        return np.einsum("ms,nms->mn", values, b[:, columns])


def dense_product(tokens: np.ndarray, rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``D[m, n] = Σ_k A[m, k] · B[n, k]`` over 64 columns, float32 ``(64, N)``; both operands swizzled rows of 128
    bytes.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return _unswizzled(rows, dtype) @ _unswizzled(tokens, dtype).T


def _unswizzled(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The 64 columns of swizzled rows of 128 bytes, in float32."""
    row = np.arange(len(rows))[:, None]
    chunks = rows.reshape(len(rows), 8, CHUNK_BYTES)[row, fragments.swizzle_128b(row, np.arange(8))]
    return chunks.reshape(len(rows), 128).view(dtype).astype(np.float32)


def _owners(sums: int) -> tuple[np.ndarray, np.ndarray]:
    return fragments.wgmma_sp_d(THREAD[:, None], np.arange(sums))


def add_to_registers(registers: np.ndarray, d: np.ndarray) -> None:
    """``registers (128, N/2) += d (64, N)``, each thread what it owns."""
    with np.errstate(invalid="ignore", over="ignore"):
        registers += d[_owners(registers.shape[1])]


def of_registers(registers: np.ndarray) -> np.ndarray:
    """The matrix ``(64, N)`` that ``registers (128, N/2)`` hold."""
    d = np.empty((64, 2 * registers.shape[1]), np.float32)
    d[_owners(registers.shape[1])] = registers
    return d
