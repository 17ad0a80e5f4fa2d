"""The pruning methods by name: from a dense weight and its calibration statistics to an array of our formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import formats
from ..errors import NMSparseError
from ..formats import Pattern, SparseArray
from ..formats.selection import magnitude
from .admm import admm_mask
from .hessian import DAMPING, damped, recentred
from .refit import refit
from .scores import ria, wanda
from .sparsegpt import sparsegpt


@dataclass(frozen=True)
class Problem:
    """One weight and what is known of its inputs; all that a method may look at.

    ``weight`` ``(M, K)`` float64 is the checkpoint's; ``centre`` ``(M, K)`` is what solvers approximate: the same, or
    :func:`~nmsparse.prune.hessian.recentred` for changed inputs. ``hessian`` ``(K, K)`` is damped, ``norms`` ``(K,)``
    are root mean squares of the input columns, ``row_weights`` ``(M,)`` say what an error of each output counts.
    """

    weight: np.ndarray
    centre: np.ndarray
    hessian: np.ndarray
    norms: np.ndarray
    row_weights: np.ndarray


Solver = Callable[[Problem, Pattern], tuple[np.ndarray, np.ndarray]]  # -> the new weight, its mask


def _ranked(score: Callable[[Problem], np.ndarray]) -> Solver:
    """A solver that keeps the weights of the largest score and does not change them."""

    def solve(problem: Problem, pattern: Pattern) -> tuple[np.ndarray, np.ndarray]:
        mask = formats.from_dense(problem.weight, pattern, scores=score(problem)).mask()
        return problem.weight * mask, mask

    return solve


def _admm(problem: Problem, pattern: Pattern) -> tuple[np.ndarray, np.ndarray]:
    mask = admm_mask(problem.centre, problem.hessian, pattern, row_weights=problem.row_weights)
    return refit(problem.centre, problem.hessian, mask), mask


def _sparsegpt(problem: Problem, pattern: Pattern) -> tuple[np.ndarray, np.ndarray]:
    return sparsegpt(problem.centre, problem.hessian, pattern, row_weights=problem.row_weights)


def _refitted(solver: Solver) -> Solver:
    """The mask of another solver with the best values for it."""

    def solve(problem: Problem, pattern: Pattern) -> tuple[np.ndarray, np.ndarray]:
        _, mask = solver(problem, pattern)
        return refit(problem.centre, problem.hessian, mask), mask

    return solve


METHODS: dict[str, Solver] = {
    "magnitude": _ranked(lambda p: magnitude(p.weight)),
    "wanda": _ranked(lambda p: wanda(p.weight, p.norms)),
    "ria": _ranked(lambda p: ria(p.weight, p.norms)),
    "sparsegpt": _sparsegpt,
    "admm": _admm,
}
METHODS |= {f"{name}+refit": _refitted(METHODS[name]) for name in ("magnitude", "wanda", "ria", "sparsegpt")}
NEEDS_NO_DATA = frozenset({"magnitude"})
KEEP_VALUES = frozenset({"magnitude", "wanda", "ria"})  # of the weights that stay


def prune_weight(
    w: np.ndarray,
    pattern: str | Pattern,
    method: str = "admm",
    *,
    hessian: np.ndarray | None = None,
    target: np.ndarray | None = None,
    row_weights: np.ndarray | None = None,
    damping: float = DAMPING,
) -> SparseArray:
    """Prune one weight ``(M, K)`` to ``pattern``; the array has the dtype of ``w``.

    ``method`` is a key of ``METHODS``: ``magnitude`` ignores the data; ``wanda`` and ``ria`` rank by weight and input;
    ``sparsegpt`` and ``admm`` also change the kept weights so that outputs stay, and ``…+refit`` gives a mask the best
    values for it. ``hessian`` ``(K, K)`` is the mean of x xᵀ over the inputs, ``target``
    ``(M, K)`` that of y xᵀ where the outputs y should be others than ``w x``, those of the dense model for inputs that
    are no longer its own (see :func:`~nmsparse.prune.hessian.recentred`), ``row_weights`` ``(M,)`` what a squared error
    of each output counts.

    Raises :class:`~nmsparse.errors.NMSparseError` for an unknown method, for a method that needs a Hessian and gets
    none, and for statistics that do not fit or are not finite.

    >>> rng = np.random.default_rng(0)
    >>> w, x = rng.standard_normal((32, 64)), rng.standard_normal((500, 64)) @ rng.standard_normal((64, 64))
    >>> def lost(method):
    ...     return np.linalg.norm(x @ (prune_weight(w, "2:4", method, hessian=x.T @ x / 500).todense() - w).T)
    >>> bool(lost("admm") < lost("sparsegpt") < lost("wanda") < lost("magnitude"))
    True
    """
    if method not in METHODS:
        raise NMSparseError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    w = np.asarray(w)
    if hessian is None:
        if method not in NEEDS_NO_DATA:
            raise NMSparseError(f"{method} needs hessian=, the second moments of the inputs; without data: 'magnitude'")
        hessian = np.eye(w.shape[-1])
    hessian = np.asarray(hessian, np.float64)
    if w.ndim != 2 or hessian.shape != (w.shape[1],) * 2:
        raise NMSparseError(f"expected w (M, K) and hessian (K, K), got {w.shape} and {hessian.shape}")
    wide = w.astype(np.float64)
    problem = Problem(
        weight=wide,
        centre=wide if target is None else restored(wide, hessian, target, damping),
        hessian=damped(hessian, damping),
        norms=np.sqrt(np.maximum(np.diag(hessian), 0)),
        row_weights=np.ones(len(w)) if row_weights is None else np.asarray(row_weights, np.float64),
    )
    pruned, mask = METHODS[method](problem, formats.parse(pattern))
    return formats.from_dense(pruned.astype(w.dtype), pattern, mask=mask)


def restored(w: np.ndarray, hessian: np.ndarray, target: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """The dense weight ``(M, K)`` float64 nearest to the outputs behind ``target``, with the damping of the solvers.

    See :func:`~nmsparse.prune.hessian.recentred`; arguments as in :func:`prune_weight`.
    """
    return recentred(w, hessian, target, damped(hessian, damping)[0, 0] - hessian[0, 0])
