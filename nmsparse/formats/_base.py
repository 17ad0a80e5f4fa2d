"""SparseArray: what every sparse weight format promises, and all that follows from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from ..errors import NMSparseError, UnsupportedDeviceError
from . import selection
from .checks import as_weight, check_dtype, is_on_gpu, resolve_scores
from .pattern import Pattern

BUFFERS = ("values", "meta", "indices")


class SparseArray:
    """A weight ``(M, K)``, or one per expert ``(E, M, K)``, sparse along K in an N:M pattern.

    The canonical buffers are ``values`` (the kept elements), ``meta`` (their positions) and, for two-level formats,
    ``indices``. They are C-contiguous, documented, and the only thing that is ever saved. A format defines four things
    and inherits the rest:

    - ``_layout(pattern, M, K)``: shape and dtype of the buffers of one matrix, and the padded size they can address;
    - ``_select(scores, pattern)``: ``meta`` and ``indices`` of what the pattern keeps;
    - ``_coordinates()``: dense row and column of each stored value;
    - ``_disorder()``: what is wrong with the order inside ``meta`` and ``indices``, if anything.

    Elements that are not stored are exactly +0 and take no part in a product, so a NaN in ``x`` reaches only the
    outputs whose stored columns (explicit zeros included) meet it. −0.0, NaN and inf are stored bit for bit.

    On a GPU (:meth:`to_device`) the buffers are :class:`nmsparse.cuda.array.DeviceArray` instead of NumPy arrays.
    Products, ``todense``, ``copy`` and the expert axis work there; ``mask``, ``astype`` and scaling raise
    :class:`~nmsparse.errors.UnsupportedDeviceError`; a full check and pickling go through the host.
    """

    format: ClassVar[str]
    __array_ufunc__ = None  # so that ndarray @ A reaches __rmatmul__

    values: Any  # np.ndarray, or DeviceArray on a GPU; so are the others
    meta: Any
    indices: Any | None
    _packed: Any = None  # the layout that GPU kernels read: derived from the buffers when first needed, never saved

    # --- what a format defines -------------------------------------------------------------------------------------

    @classmethod
    def _layout(cls, pattern: Pattern, rows: int, cols: int) -> tuple[dict[str, tuple[tuple[int, ...], Any]], int, int]:
        """``({buffer: (shape, dtype; None for the array's own)}, padded rows, padded columns)`` of one matrix."""
        raise NotImplementedError

    @classmethod
    def _select(cls, scores: np.ndarray, pattern: Pattern) -> dict[str, np.ndarray]:
        """``meta`` (and ``indices``) of what ``pattern`` keeps of padded scores ``(Mp, Kp)``."""
        raise NotImplementedError

    def _coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Dense row and column of every stored value of a matrix, each broadcastable to ``values.shape``."""
        raise NotImplementedError

    def _disorder(self) -> str | None:
        """What breaks the order that ``meta`` and ``indices`` promise, or None."""
        raise NotImplementedError

    # --- making one ------------------------------------------------------------------------------------------------

    def __init__(self, pattern: Pattern, shape: tuple[int, ...], buffers: dict[str, np.ndarray]):
        self.pattern = pattern
        self.shape = tuple(int(size) for size in shape)
        self.values, self.meta, self.indices = (buffers.get(name) for name in BUFFERS)

    @classmethod
    def _from_dense(
        cls,
        w: np.ndarray,
        pattern: Pattern,
        scores: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strict: bool = False,
    ) -> SparseArray:
        w = as_weight(w, cls.__name__ + ".from_dense")
        scores, mask = resolve_scores(w, scores, mask, strict)
        if w.ndim == 3:
            matrices = [
                cls._from_matrix(w[e], pattern, None if scores is None else scores[e]) for e in range(w.shape[0])
            ]
            array = stack(matrices) if matrices else cls._empty(pattern, w.shape, w.dtype)
        else:
            array = cls._from_matrix(w, pattern, scores)
        return array if mask is None else array._restrict(mask, strict)

    @classmethod
    def _from_matrix(cls, w: np.ndarray, pattern: Pattern, scores: np.ndarray | None) -> SparseArray:
        _, rows, cols = cls._layout(pattern, *w.shape)
        padded = selection.pad(selection.importance(w, scores), rows, cols, selection.PADDING)
        chosen = cls._select(padded, pattern)
        array = cls(pattern, w.shape, {name: np.ascontiguousarray(buffer) for name, buffer in chosen.items()})
        array.values = np.ascontiguousarray(selection.pad(w, rows, cols, 0)[array._coordinates()])
        return array

    @classmethod
    def _empty(cls, pattern: Pattern, shape: tuple[int, ...], dtype: np.dtype) -> SparseArray:
        """An array of no experts."""
        layout, *_ = cls._layout(pattern, *shape[-2:])
        return cls(pattern, shape, {name: np.zeros((0, *size), kind or dtype) for name, (size, kind) in layout.items()})

    def _restrict(self, mask: np.ndarray, strict: bool) -> SparseArray:
        """Set stored elements outside ``mask`` to 0; raise if the pattern could not store one inside it."""
        lost = np.argwhere(mask & ~self.mask())
        if len(lost):
            *expert, row, col = map(int, lost[0])
            where = f"expert {expert[0]}, " if expert else ""
            what = "strict=True: w" if strict else "mask"
            raise NMSparseError(
                f"{what} does not fit the pattern at {where}row {row}, column {col} (and {len(lost) - 1} more places): "
                f"{self.pattern.rule(row, col)}; drop strict/mask to let the pattern choose, or prune w first"
            )
        if not strict and self.values.size:  # strict: what lies outside the mask is a zero already
            kept = self._map_matrices(
                lambda matrix, e: selection.pad(mask[e], *matrix._padded(), 0)[matrix._coordinates()]
            )
            self.values[~kept] = 0
        return self

    @classmethod
    def _from_buffers(cls, pattern: Pattern, buffers: dict[str, Any], shape: tuple[int, ...]) -> SparseArray:
        shape = tuple(shape)
        if len(shape) not in (2, 3) or not all(isinstance(size, (int, np.integer)) and size >= 0 for size in shape):
            raise NMSparseError(f"{cls.__name__}: expected a shape (M, K) or (E, M, K), got {shape}")
        held = {name: cls._hold(buffer, name) for name, buffer in buffers.items() if buffer is not None}
        array = cls(pattern, shape, held)
        array.check_format(full=True)
        return array

    @classmethod
    def _hold(cls, buffer: Any, name: str) -> Any:
        """A canonical buffer as an array keeps it: in C order, without a copy where it is so already."""
        if isinstance(buffer, np.ndarray):
            return np.ascontiguousarray(buffer)
        if not is_on_gpu(buffer):
            raise NMSparseError(
                f"{cls.__name__}: expected {name} as a numpy array or an array on a GPU, got {type(buffer).__name__}"
            )
        held = cls._cuda("array").view(buffer)
        if not held.contiguous:
            raise NMSparseError(f"{cls.__name__}: expected {name} in C order, got strides {held.strides}; copy it")
        return held

    @classmethod
    def _random(cls, shape: tuple[int, ...], pattern: Pattern, dtype: Any, rng: Any) -> SparseArray:
        rng = np.random.default_rng(rng)
        w = rng.standard_normal(shape, np.float32).astype(dtype)
        return cls._from_dense(w, pattern, scores=rng.random(shape, np.float32))

    # --- describing it ---------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> np.dtype:
        """dtype of the kept values."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """2 for a matrix, 3 with an expert axis."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the dense weight."""
        return int(np.prod(self.shape))

    @property
    def nnz(self) -> int:
        """Number of stored values: explicit zeros and those that pad the last group included."""
        return self.values.size

    @property
    def density(self) -> float:
        """``nnz`` over the number of elements of the dense weight."""
        return self.nnz / self.size if self.size else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers().values())

    @property
    def device(self) -> str:
        """Where the buffers live: ``"cpu"`` or ``"cuda:0"``."""
        return "cpu" if self._gpu < 0 else f"cuda:{self._gpu}"

    @property
    def _gpu(self) -> int:
        """Number of the GPU that holds the buffers, -1 for the host."""
        values = self.values
        return -1 if isinstance(values, np.ndarray) else values.device

    @property
    def T(self) -> Transposed:
        """The transpose, as a view: ``x @ A.T`` multiplies token-major activations."""
        return Transposed(self)

    def buffers(self) -> dict[str, Any]:
        """The canonical buffers by name; each one goes through DLPack without a copy."""
        return {name: buffer for name in BUFFERS if (buffer := getattr(self, name)) is not None}

    def __repr__(self) -> str:
        sizes = ", ".join(map(str, self.shape))
        return (
            f"{type(self).__name__}({self.dtype.name}[{sizes}], {self.pattern}, nnz={self.nnz}, device={self.device!r})"
        )

    # --- leaving the format ----------------------------------------------------------------------------------------

    def todense(self) -> np.ndarray:
        """The dense weight, zeros where nothing is stored. Of an array on a GPU: a ``DeviceArray`` there."""
        if self._gpu >= 0:
            return self._cuda("pack").todense(self)
        return self._scatter(self.values, self.dtype)

    toarray = todense

    def mask(self) -> np.ndarray:
        """Where a value is stored (explicit zeros included), as a dense bool array. On the host only."""
        self._need_host("mask")
        return self._scatter(np.ones(self.values.shape, bool), bool)

    def _scatter(self, stored: np.ndarray, dtype: Any) -> np.ndarray:
        def dense(matrix: SparseArray, e: Any) -> np.ndarray:
            out = np.zeros(matrix._padded(), dtype)
            out[matrix._coordinates()] = stored[e]
            return out[: matrix.shape[0], : matrix.shape[1]]

        return np.ascontiguousarray(self._map_matrices(dense)) if 0 not in self.shape else np.zeros(self.shape, dtype)

    def _map_matrices(self, function: Any) -> np.ndarray:
        """``function(matrix, index)`` of the matrix, or of each expert's, stacked."""
        if self.ndim == 2:
            return function(self, ...)
        return np.stack([function(self[e], e) for e in range(self.shape[0])])

    def _padded(self) -> tuple[int, int]:
        _, rows, cols = self._layout(self.pattern, *self.shape[-2:])
        return rows, cols

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} does not turn into a dense array by itself; call its todense()")

    # --- converting and scaling ------------------------------------------------------------------------------------

    def _with_values(self, values: np.ndarray) -> SparseArray:
        return type(self)(self.pattern, self.shape, {**self.buffers(), "values": values})

    def astype(self, dtype: Any) -> SparseArray:
        """The same pattern with values in another dtype; ``meta`` and ``indices`` are shared. On the host only."""
        self._need_host("astype")
        return self._with_values(self.values.astype(check_dtype(np.dtype(dtype), "astype")))

    def copy(self) -> SparseArray:
        """A copy that shares nothing."""
        return type(self)(self.pattern, self.shape, {name: buffer.copy() for name, buffer in self.buffers().items()})

    def to_device(self, device: str) -> SparseArray:
        """The array on ``device``: ``"cpu"``, ``"cuda"`` (the current GPU) or ``"cuda:1"``; itself if it is there.

        Copies the buffers otherwise, and is done when it returns. Raises
        :class:`~nmsparse.errors.UnsupportedDeviceError` where there is no such device.
        """
        match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", device)
        if not match:
            raise UnsupportedDeviceError(f"device {device!r}: expected 'cpu', 'cuda' or 'cuda:N', N a GPU's number")
        if device == self.device or (device == "cuda" and self._gpu >= 0):
            return self
        host = self.buffers() if self._gpu < 0 else {name: buffer.numpy() for name, buffer in self.buffers().items()}
        if device != "cpu":
            number = int(match[1]) if match[1] else self._cuda("driver").current_device()
            from_host = self._cuda("array").from_host
            host = {name: from_host(buffer, number) for name, buffer in host.items()}
        return type(self)(self.pattern, self.shape, host)

    def to_torch(self) -> dict[str, Any]:
        """The canonical buffers by name, as tensors of torch on the same memory (``meta`` of 2:4 is uint16)."""
        return self._buffers().to_torch(self)

    @staticmethod
    def from_torch(buffers: Any, pattern: str | Pattern, shape: tuple[int, ...]) -> SparseArray:
        """The array that holds these canonical buffers, tensors by name, on their memory; every position is checked."""
        return SparseArray._buffers().from_torch(buffers, pattern, shape)

    def _need_host(self, what: str) -> None:
        if self._gpu >= 0:
            raise UnsupportedDeviceError(f"{what} of {self!r} runs on the host only: call it on A.to_device('cpu')")

    def __getstate__(self) -> dict[str, Any]:
        # What GPU kernels derived from the buffers stays behind.
        return {"pattern": self.pattern, "shape": self.shape, **{name: getattr(self, name) for name in BUFFERS}}

    def __getitem__(self, expert: int) -> SparseArray:
        if self.ndim != 3 or not isinstance(expert, (int, np.integer)):
            raise NMSparseError(f"{self!r} can only be indexed by one expert number, (E, M, K)[e]; slice its todense()")
        if not -self.shape[0] <= expert < self.shape[0]:
            raise IndexError(f"expert {expert} of {self.shape[0]}")
        buffers = {name: buffer[expert] for name, buffer in self.buffers().items()}
        one = type(self)(self.pattern, self.shape[1:], buffers)
        if self._packed is not None:
            one._packed = self._packed[expert]
        return one

    def __neg__(self) -> SparseArray:
        self._need_host("-A")
        return self._with_values(-self.values)

    def __mul__(self, scalar: Any) -> SparseArray:
        if np.ndim(scalar) or isinstance(scalar, SparseArray):
            return NotImplemented
        self._need_host("scaling")
        return self._with_values((self.values * scalar).astype(self.dtype))

    __rmul__ = __mul__

    # --- products --------------------------------------------------------------------------------------------------

    # What ``@`` runs, what imports a module of ``nmsparse.cuda``, and what imports ``nmsparse.torch.buffers``. They
    # stand above the formats: ``nmsparse.ops`` puts them here, nothing is imported upward.
    _product: ClassVar[Callable[..., Any]]
    _cuda: ClassVar[Callable[[str], ModuleType]]
    _buffers: ClassVar[Callable[[], ModuleType]]

    def __matmul__(self, other: Any) -> np.ndarray:
        return SparseArray._product(self, other)

    def __rmatmul__(self, other: Any) -> np.ndarray:
        return SparseArray._product(other, self)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, operands: Any = (), options: Any = None) -> Any:
        """``tensor @ A.T`` without the 13 µs that torch takes to find out that it cannot do it."""
        if function.__name__ not in ("matmul", "__matmul__"):
            return NotImplemented
        return SparseArray._product(*operands, **(options or {}))

    # --- checking --------------------------------------------------------------------------------------------------

    def check_format(self, full: bool = False) -> None:
        """Raise :class:`~nmsparse.errors.NMSparseError` if the buffers are not what the format promises.

        Shapes and dtypes always (O(1)); with ``full=True`` also the order of every position and index (a full scan; an
        array on a GPU is copied to the host for it).
        """
        check_dtype(self.dtype, type(self).__name__)
        layout, *_ = self._layout(self.pattern, *self.shape[-2:])
        if set(layout) != set(self.buffers()):
            raise NMSparseError(f"{type(self).__name__}: expected buffers {list(layout)}, got {list(self.buffers())}")
        if len({getattr(buffer, "device", "cpu") for buffer in self.buffers().values()}) > 1:
            raise NMSparseError(f"{type(self).__name__}: expected all buffers on one device, got {self.buffers()}")
        for name, (size, dtype) in layout.items():
            buffer, size = getattr(self, name), self.shape[:-2] + size
            if buffer.shape != size or (dtype is not None and buffer.dtype != dtype):
                want = np.dtype(dtype or self.dtype).name
                raise NMSparseError(
                    f"{type(self).__name__} {self.pattern} of shape {self.shape}: expected {name} as "
                    f"{want}{list(size)}, got {buffer.dtype.name}{list(buffer.shape)}"
                )
        if full and self._gpu >= 0:
            self.to_device("cpu").check_format(full=True)
        elif full and (problem := self._disorder() or self._stray()):
            raise NMSparseError(f"{type(self).__name__} {self.pattern}: {problem}; the buffers are corrupt")

    def _stray(self) -> str | None:
        """Whether a value other than 0 is stored in the padding, where products would meet it and ``todense`` not."""
        height, width = self.shape[-2:]
        if self._padded() == (height, width) or not self.values.size:
            return None

        def strays(matrix: SparseArray, e: Any) -> np.ndarray:
            rows, cols = matrix._coordinates()
            return (matrix.values != 0) & ((rows >= height) | (cols >= width))

        return "values holds numbers in the padding" if self._map_matrices(strays).any() else None


class Transposed:
    """``A.T``: a view of a sparse array with its last two axes swapped. ``A.T.T is A``."""

    __array_ufunc__ = None
    __slots__ = ("T",)

    def __init__(self, array: SparseArray):
        self.T = array

    @property
    def shape(self) -> tuple[int, ...]:
        """``(…, K, M)``."""
        *lead, rows, cols = self.T.shape
        return (*lead, cols, rows)

    @property
    def dtype(self) -> np.dtype:
        """dtype of the kept values."""
        return self.T.dtype

    @property
    def ndim(self) -> int:
        """2 for a matrix, 3 with an expert axis."""
        return self.T.ndim

    @property
    def device(self) -> str:
        """Where the buffers live."""
        return self.T.device

    def todense(self) -> np.ndarray:
        """The dense transpose; on the host only."""
        self.T._need_host("todense of A.T")
        return np.swapaxes(self.T.todense(), -1, -2)

    def __repr__(self) -> str:
        return f"{self.T!r}.T"

    __array__ = SparseArray.__array__
    __matmul__ = SparseArray.__matmul__
    __rmatmul__ = SparseArray.__rmatmul__
    __torch_function__ = SparseArray.__torch_function__


def stack(arrays: list[SparseArray]) -> SparseArray:
    """Matrices of one format, pattern, shape and dtype as the experts of one ``(E, M, K)`` array.

    >>> from nmsparse import NMArray
    >>> a = NMArray.from_dense(np.eye(4, dtype=np.float32))
    >>> stack([a, -a])
    NMArray(float32[2, 4, 4], 2:4, nnz=64, device='cpu')
    """
    for a in arrays:
        a._need_host("stack")
    kinds = {(type(a).__name__, str(a.pattern), a.shape, a.dtype.name) for a in arrays}
    if len(kinds) != 1 or arrays[0].ndim != 2:
        raise NMSparseError(f"stack: expected matrices of one format, pattern, shape and dtype, got {sorted(kinds)}")
    first = arrays[0]
    buffers = {name: np.stack([getattr(a, name) for a in arrays]) for name in first.buffers()}
    return type(first)(first.pattern, (len(arrays), *first.shape), buffers)
