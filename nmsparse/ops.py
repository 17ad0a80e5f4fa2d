"""Products with sparse arrays: check the operands, choose a backend, run it.

The layout the kernels know is token-major: ``y = x @ A.T`` with ``x`` ``(T, K)`` and ``A`` ``(M, K)``. ``A @ b`` is
the same product transposed. Products that reduce along M (``x @ A``, ``A.T @ y``) cut across the sparse groups; they
decode A and run as dense products.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import formats, reference
from .errors import NMSparseError, UnsupportedDeviceError
from .formats import Pattern, SparseArray, Transposed, parse
from .formats.checks import DTYPES, as_weight, common_dtype, resolve_scores
from .formats.selection import importance

__all__ = ["array", "grouped_matmul", "matmul"]


def array(
    w: np.ndarray,
    pattern: str | Pattern,
    *,
    scores: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    strict: bool = False,
) -> SparseArray:
    """Prune and pack ``w`` ``(M, K)`` or ``(E, M, K)`` by the compiled kernels; bitwise what ``from_dense`` gives.

    ``scores`` (same shape) rank instead of ``|w|``; ``mask`` (bool) says what to keep; ``strict=True`` keeps every
    non-zero of ``w``. The last two raise :class:`~nmsparse.errors.NMSparseError` where the pattern has no room.

    >>> array(np.eye(64, 128, dtype=np.float32), "samoyeds:1:2:64")
    SamoyedsArray(float32[64, 128], samoyeds:1:2:64, nnz=2048, device='cpu')
    """
    w, pattern = as_weight(w, "array"), parse(pattern)
    ranks, wanted = resolve_scores(w, scores, mask, strict)
    ranks = None if ranks is None else importance(w, ranks)
    if np.float64 in (w.dtype, getattr(ranks, "dtype", None)):  # the kernels rank in float32
        return formats.from_dense(w, pattern, scores=scores, mask=mask, strict=strict)
    from .cpu.pack import pack

    packed = formats.CLASSES[pattern.format](pattern, w.shape, pack(w, pattern, ranks))
    return packed if wanted is None else packed._restrict(wanted, strict)


def matmul(a: Any, b: Any, *, out: np.ndarray | None = None) -> np.ndarray:
    """``a @ b`` where one is a sparse array ``A``, ``(M, K)`` or ``(E, M, K)`` for a batch of experts, or its ``A.T``.

    ==============  =======================  ==============  =====================================
    product         dense operand            result          runs
    ==============  =======================  ==============  =====================================
    ``x @ A.T``     ``(…, K)``               ``(…, M)``      on the stored values (token-major)
    ``A @ b``       ``(K,)`` or ``(K, N)``   ``(M[, N])``    on the stored values
    ``x @ A``       ``(…, M)``               ``(…, K)``      decoded
    ``A.T @ b``     ``(M,)`` or ``(M, N)``   ``(K[, N])``    decoded
    ==============  =======================  ==============  =====================================

    With an expert axis the dense operand has it too: ``(E, T, K) @ A.T``. fp16 and bf16 operands are multiplied and
    summed in fp32, float64 in float64; the result has the dtype of both, or
    the wider one (float16 with bfloat16: float32). ``out`` receives it if given.

    >>> A = formats.NMArray.from_dense(np.eye(4, dtype=np.float32))
    >>> A @ np.array([1, 2, 3, 4], np.float32)
    array([1., 2., 3., 4.], dtype=float32)
    """
    sparse = [isinstance(operand, (SparseArray, Transposed)) for operand in (a, b)]
    if sum(sparse) != 1:
        raise NMSparseError(
            f"matmul: expected one sparse and one dense operand, got {type(a).__name__} and {type(b).__name__}; "
            "decode one with todense() if both are sparse"
        )
    if sparse[0]:
        vector = np.ndim(b) == 1
        b = as_activation(b, "matmul")
        columns = b[:, None] if vector else np.swapaxes(b, -1, -2) if b.ndim > 1 else b
        if b.ndim not in (1, a.ndim):
            raise NMSparseError(f"matmul: expected a {a.ndim}-D right operand for {a!r}, got shape {b.shape}")
        tokens = columns.T if vector else columns
        y = np.swapaxes(_tokens_times(tokens, a.T, a, b), -1, -2)
        y = y[:, 0] if vector else y
    else:
        a = as_activation(a, "matmul")
        y = _tokens_times(a, b, a, b)
    if out is None:
        return np.ascontiguousarray(y)
    if not isinstance(out, np.ndarray) or out.shape != y.shape or out.dtype != y.dtype:
        raise NMSparseError(f"matmul: expected out as {y.dtype.name}{list(y.shape)}, got {_describe(out)}")
    out[...] = y
    return out


SparseArray._product = staticmethod(matmul)


def _tokens_times(x: np.ndarray, w: SparseArray | Transposed, left: Any, right: Any) -> np.ndarray:
    """``x @ w`` for token-major ``x``; ``left`` and ``right`` are the caller's operands, for the message."""
    batch = w.shape[:-2]
    if x.ndim == 0 or x.shape[-1] != w.shape[-2] or (batch and (x.ndim != 3 or x.shape[:1] != batch)):
        raise NMSparseError(
            f"matmul: dimension mismatch, {np.shape(left)} @ {np.shape(right)}: the inner sizes must agree"
            + (", and so must the expert axis" if batch else "")
        )
    dtype = common_dtype(x.dtype, w.dtype)
    lead, tokens = x.shape[:-1], x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if isinstance(w, SparseArray) or dtype == np.float64:
        compute = np.promote_types(dtype, np.float32)
        return (x.astype(compute) @ w.todense().astype(compute)).astype(dtype)
    from .cpu import matmul as cpu

    tokens = np.ascontiguousarray(tokens, np.float32)
    if batch:
        ends = np.arange(1, batch[0] + 1, dtype=np.int64) * lead[-1]
        y = cpu.grouped_matmul(w.T, tokens, ends)
    else:
        y = cpu.matmul(w.T, tokens)
    return y.reshape(*lead, w.shape[-1]).astype(dtype, copy=False)


def grouped_matmul(x: np.ndarray, w: SparseArray, offsets: np.ndarray) -> np.ndarray:
    """Rows ``offsets[e-1]:offsets[e]`` of ``x`` ``(S, K)`` times ``w[e].T`` of ``w`` ``(E, M, K)``: ``(S, M)``.

    ``offsets`` ``(E,)`` are cumulative ends, int32 or int64, the last one S: the ``offs`` convention of
    ``torch.nn.functional.grouped_mm``. Experts without rows cost nothing.

    >>> w = formats.random((2, 4, 16), "2:4", rng=0)
    >>> x = np.ones((3, 16), np.float32)
    >>> y = grouped_matmul(x, w, np.array([1, 3], np.int32))
    >>> np.allclose(y, [w[0] @ x[0], w[1] @ x[1], w[1] @ x[2]])
    True
    """
    x = as_activation(x, "grouped_matmul")
    if not isinstance(w, SparseArray) or w.ndim != 3:
        raise NMSparseError(f"grouped_matmul: expected w as a sparse array (E, M, K), got {_describe(w)}")
    if x.ndim != 2 or x.shape[1] != w.shape[2]:
        raise NMSparseError(f"grouped_matmul: expected x (S, K={w.shape[2]}), got shape {x.shape}")
    offsets = check_offsets(offsets, w.shape[0], len(x))
    dtype = common_dtype(x.dtype, w.dtype)
    if dtype == np.float64:
        return reference.grouped_matmul(x, w, offsets)
    from .cpu import matmul as cpu

    return cpu.grouped_matmul(w, np.ascontiguousarray(x, np.float32), offsets).astype(dtype, copy=False)


def check_offsets(offsets: Any, experts: int, rows: int) -> np.ndarray:
    """``offsets`` if they split ``rows`` rows among ``experts`` experts."""
    offsets = np.asarray(offsets)
    if offsets.dtype not in (np.int32, np.int64) or offsets.shape != (experts,):
        raise NMSparseError(f"offsets: expected int32 or int64[{experts}], got {_describe(offsets)}")
    ends = np.concatenate([[0], offsets])
    if (np.diff(ends) < 0).any() or ends[-1] != rows:
        raise NMSparseError(
            f"offsets: expected non-decreasing ends of the experts' rows, the last one {rows}, got {offsets.tolist()}"
        )
    return offsets


def as_activation(x: Any, who: str) -> np.ndarray:
    """``x`` as a NumPy array of a supported floating dtype; other libraries' CPU arrays are viewed through DLPack."""
    if not isinstance(x, (np.ndarray, list, tuple, float, int)) and hasattr(x, "__dlpack_device__"):
        device, _ = x.__dlpack_device__()
        if device != 1:  # kDLCPU
            raise UnsupportedDeviceError(
                f"{who}: {type(x).__name__} is on DLPack device type {int(device)}; this version has CPU kernels only"
            )
        x = np.from_dlpack(x)
    x = np.asarray(x)
    if x.dtype not in DTYPES:
        names = ", ".join(d.name for d in DTYPES)
        raise NMSparseError(
            f"{who}: expected activations in {names}, got {x.dtype}; convert with astype(numpy.float32)"
        )
    return x


def _describe(value: Any) -> str:
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{value.dtype.name}{list(value.shape)}"
    return repr(value) if isinstance(value, SparseArray) else type(value).__name__
