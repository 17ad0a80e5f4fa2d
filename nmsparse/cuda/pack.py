"""Weights on a GPU: pruned to 2:4, packed for the tensor cores, decoded; each in one pass over memory.

The kernels of 2:4 serve every format's inner level: the condensed matrix of V:N:M and the stored rows of Samoyeds are
2:4 buffers. Choosing what V:N:M, Samoyeds and other n:m keep, and decoding them, goes through the host for now.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import NMSparseError, UnsupportedDeviceError
from ..formats import CLASSES, Pattern, SparseArray
from ..formats.nm import is_24
from . import driver
from .array import DeviceArray, current_stream, empty, from_host, view
from .cache import cached
from .compiler import Cubin, compile_kernel
from .driver import Kernel
from .kernels import pack as kernels
from .launch import arch_of
from .layout import BLOCK_BYTES, blocks_of, interleaved

__all__ = ["PackConfig", "array", "as_24", "build", "decode", "pack_blocks", "packed", "prune", "prunes", "todense"]

# The kernels and their arguments: addresses and int32.
MAKERS = MappingProxyType({"pack": kernels.make_pack, "prune": kernels.make_prune, "decode": kernels.make_decode})
SIGNATURES = MappingProxyType({"pack": "pppiiiii", "prune": "ppppiiiiii", "decode": "pppiiiiii"})
DTYPES = MappingProxyType({"float16": "f16", "bfloat16": "bf16"})
THREADS_A_BLOCK = 128  # of the packed layout, not of the launch


@dataclass(frozen=True)
class PackConfig:
    """What a pass does. ``aligned``: rows of the dense weight start at multiples of 16 bytes. ``interleave``: gate and
    up rows are packed side by side."""

    dtype: str = "f16"
    aligned: bool = True
    canonical: bool = True
    blocks: bool = False
    interleave: bool = False
    threads: int = 256


# --- on device arrays ------------------------------------------------------------------------------------------------


def pack_blocks(values: DeviceArray, meta: DeviceArray, stream: int = 0, *, interleave: bool = False) -> DeviceArray:
    """Canonical 2:4 buffers ``values (…, R, C)`` of 16 bits and ``meta (…, R, C/8)`` as packed blocks, uint8
    ``(…, ⌈R/64⌉, blocks along K, BLOCK_BYTES)``: :func:`nmsparse.cuda.layout.pack_blocks` of each matrix.
    ``interleave``: of each matrix with its rows in the order of :func:`nmsparse.cuda.layout.interleaved`.

    Runs on ``stream``; does not wait.
    """
    _check_buffers(values, meta)
    *lead, rows, stored = values.shape
    down, along = blocks_of(len(interleaved(rows)) if interleave else rows, 2 * stored)
    packed = empty((*lead, down, along, BLOCK_BYTES), np.uint8, values.device)
    sizes = rows, stored // 8, down, along
    _launch("pack", PackConfig(_letters(values.dtype), interleave=interleave), (values, meta, packed), sizes, stream)
    return packed


def prune(w: DeviceArray, *, canonical: bool = True, blocks: bool = False, stream: int = 0) -> dict[str, DeviceArray]:
    """The largest two of every four columns of ``w (…, M, K)``, float16 or bfloat16, in one pass.

    ``values`` and ``meta`` if ``canonical``, bit for bit those of ``NMArray.from_dense``; ``blocks`` if asked for,
    those of :func:`pack_blocks`. Runs on ``stream``; does not wait.
    """
    if not w.contiguous:
        raise NMSparseError(f"prune: expected a weight in C order, got {w!r} with strides {w.strides}; copy it first")
    *lead, rows, columns = w.shape
    down, along = blocks_of(rows, columns)
    pieces = -(-columns // 16)
    parts = {}
    if canonical:
        parts["values"] = empty((*lead, rows, 8 * pieces), w.dtype, w.device)
        parts["meta"] = empty((*lead, rows, pieces), np.uint16, w.device)
    if blocks:
        parts["blocks"] = empty((*lead, down, along, BLOCK_BYTES), np.uint8, w.device)
    cfg = PackConfig(_letters(w.dtype), _aligned(w), canonical, blocks)
    arrays = (w, *(parts.get(name) for name in ("values", "meta", "blocks")))
    _launch("prune", cfg, arrays, (rows, columns, pieces, down, along), stream)
    return parts


def decode(values: DeviceArray, meta: DeviceArray, columns: int, stream: int = 0) -> DeviceArray:
    """The dense weight ``(…, R, columns)`` of canonical 2:4 buffers of 16 bits. Runs on ``stream``; does not wait."""
    _check_buffers(values, meta)
    *lead, rows, stored = values.shape
    w = empty((*lead, rows, columns), values.dtype, values.device)
    cfg = PackConfig(_letters(w.dtype), _aligned(w))
    _launch("decode", cfg, (values, meta, w), (rows, columns, stored // 8, *blocks_of(rows, columns)), stream)
    return w


def _check_buffers(values: DeviceArray, meta: DeviceArray) -> None:
    for name, buffer in {"values": values, "meta": meta}.items():
        if not buffer.contiguous:
            raise NMSparseError(f"expected {name} in C order, got {buffer!r} with strides {buffer.strides}")
    if values.pointer % 16:
        raise NMSparseError(f"expected values at a multiple of 16 bytes, got address {values.pointer:#x}; copy them")
    if values.shape[-1] % 8 or meta.shape != (*values.shape[:-1], values.shape[-1] // 8) or meta.dtype != np.uint16:
        raise NMSparseError(
            f"expected 2:4 buffers, values (…, R, C) and meta uint16 (…, R, C/8), got {values!r} and {meta!r}"
        )


def _letters(dtype: np.dtype) -> str:
    try:
        return DTYPES[dtype.name]
    except KeyError:
        raise UnsupportedDeviceError(
            f"the GPU kernels take float16 and bfloat16, got {dtype}; convert with astype before to_device"
        ) from None


def _aligned(w: DeviceArray) -> bool:
    return w.shape[-1] % 8 == 0 and w.pointer % 16 == 0


# --- launching -------------------------------------------------------------------------------------------------------


def build(name: str, cfg: PackConfig, arch: str) -> Cubin:
    """Compile kernel ``name``: "pack", "prune" or "decode"."""
    from .tile.gpu import elements

    return compile_kernel(MAKERS[name](elements.make(cfg), cfg), SIGNATURES[name], arch, threads=cfg.threads)


@functools.cache
def _kernel(name: str, cfg: PackConfig, device: int) -> Kernel:
    arch = arch_of(device)
    cubin = cached(name, cfg, arch, lambda: build(name, cfg, arch))
    return Kernel(cubin.code, cubin.entry, SIGNATURES[name], threads=cfg.threads, shared_bytes=0, what=f"{name} {cfg}")


def _launch(name: str, cfg: PackConfig, arrays: tuple[Any, ...], sizes: tuple[int, ...], stream: int) -> None:
    """``sizes`` end with the rows of blocks and the blocks of a row; these and the experts give all blocks."""
    first = arrays[0]
    number = math.prod(first.shape[:-2]) * sizes[-2] * sizes[-1]
    if not number:
        return
    if number * THREADS_A_BLOCK >= 2**31:
        raise NMSparseError(f"{name}: {first!r} is too large for one launch; split it along the experts")
    addresses = [array.pointer if array is not None else 0 for array in arrays]
    with driver.using(first.device):
        kernel = _kernel(name, cfg, first.device)
        kernel(-(-number * THREADS_A_BLOCK // cfg.threads), stream, *addresses, *sizes, number)


# --- on sparse arrays ------------------------------------------------------------------------------------------------


def packed(A: SparseArray, stream: int = 0) -> DeviceArray:
    """The blocks of ``A``, which is on a GPU: of its 2:4 buffers, V:N:M's condensed columns, Samoyeds' stored rows.

    Derived at the first call and kept with ``A``; buffers that are changed in place afterwards are not seen. Complete
    on return, so that any stream can read them.
    """
    if A._packed is None:
        if A.format == "nm" and not is_24(A.pattern):
            raise UnsupportedDeviceError(f"{A!r}: the sparse tensor cores multiply 2:4 only; use to_device('cpu')")
        A._packed = pack_blocks(A.values, A.meta, stream)
        driver.synchronize(stream, A.values.device)
    return A._packed


def as_24(A: SparseArray) -> SparseArray:
    """``A``, which is on a GPU, as 2:4 with explicit zeros; Samoyeds and V:N:M with m a multiple of 4 have room there.

    Raises :class:`~nmsparse.errors.NMSparseError` where ``A`` has more than two non-zeros in four columns.
    """
    host = A.to_device("cpu")
    return CLASSES["nm"].from_dense(host.todense(), 2, 4, strict=True).to_device(A.device)


def prunes(pattern: Pattern, dtype: np.dtype) -> bool:
    """Whether :func:`array` takes a weight of ``dtype`` and prunes it to ``pattern``."""
    return pattern.format == "nm" and is_24(pattern) and dtype.name in DTYPES


def array(w: Any, pattern: Pattern) -> SparseArray:
    """``NMArray.from_dense(w)``, bit for bit, of a weight ``(M, K)`` or ``(E, M, K)`` on a GPU; where :func:`prunes`.

    Complete on return.
    """
    here, stream = view(w), current_stream(w)
    if here.ndim not in (2, 3):
        raise NMSparseError(f"array: expected a weight (M, K), or (E, M, K) for experts, got shape {tuple(here.shape)}")
    buffers = prune(here, stream=stream)
    driver.synchronize(stream, here.device)
    return CLASSES[pattern.format](pattern, here.shape, buffers)


def todense(A: SparseArray) -> DeviceArray:
    """``A``, which is on a GPU, as a dense weight there: 2:4 by a kernel, other formats through the host."""
    device = A.values.device
    if prunes(A.pattern, A.dtype):
        return decode(A.values, A.meta, A.shape[-1])
    return from_host(A.to_device("cpu").todense(), device)
