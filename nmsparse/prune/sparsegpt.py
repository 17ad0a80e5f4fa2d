"""SparseGPT: Optimal Brain Surgeon, column after column, with a choice of mask for every pattern.

Removing weights D of a row at once, and moving the others to make up for it, costs ``w_Dᵀ ((H⁻¹)_DD)⁻¹ w_D``. Columns
are settled from left to right; those to the right take over what was removed. Each block of columns is chosen when the
sweep reaches it, by the joint cost of what would go: pairs for 2:4, sets of columns for V:N:M, whole sub-rows for
Samoyeds.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML'23,
arXiv:2301.00774; Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np

from ..formats import VNM, Pattern, Samoyeds, parse

_MOST_SETS = 256  # of columns that are compared jointly; beyond, columns are ranked one by one


def sparsegpt(
    w: np.ndarray, hessian: np.ndarray, pattern: str | Pattern, *, row_weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Prune ``w`` ``(M, K)`` to ``pattern``: the updated weight float64, 0 where nothing is kept, and the bool mask.

    ``hessian`` ``(K, K)`` is positive definite. ``row_weights`` ``(M,)`` say what an error of each output counts where
    a pattern decides between rows (None: the same).

    >>> w, mask = sparsegpt(np.array([[1.0, 1.0, 3.0, 0.5]]), np.eye(4), "2:4")
    >>> w.tolist(), mask.astype(int).tolist()
    ([[1.0, 0.0, 3.0, 0.0]], [[1, 0, 1, 0]])
    """
    pattern = parse(pattern)
    width = pattern.v if isinstance(pattern, Samoyeds) else pattern.m
    w = np.array(w, np.float64)
    weights = np.ones(len(w)) if row_weights is None else row_weights
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T  # rows j.. of it give the inverse Hessian of columns j..
    mask = np.empty(w.shape, bool)
    for start in range(0, w.shape[1], width):
        block = slice(start, start + width)
        upper, stop = factor[block, block], min(start + width, w.shape[1])
        mask[:, block] = choose(w[:, block], upper.T @ upper, pattern, weights)
        errors = np.empty((len(w), stop - start))
        for j in range(stop - start):
            errors[:, j] = np.where(mask[:, start + j], 0, w[:, start + j]) / upper[j, j]
            w[:, start + j : stop] -= errors[:, j, None] * upper[j, j:]
        w[:, stop:] -= errors @ factor[block, stop:]
    return np.where(mask, w, 0), mask


def choose(w: np.ndarray, inverse: np.ndarray, pattern: Pattern, row_weights: np.ndarray) -> np.ndarray:
    """What ``pattern`` keeps of one block of columns, bool ``(M, k)``, by the joint cost of what it removes.

    ``w`` ``(M, k)`` are the columns of one group (of m, or of v for Samoyeds; the last one may be narrower) and
    ``inverse`` ``(k, k)`` the inverse Hessian of them when all columns before are settled.
    """
    if isinstance(pattern, Samoyeds):
        return _choose_rows(w, inverse, pattern, row_weights)
    if isinstance(pattern, VNM):
        return _choose_columns(w, inverse, pattern, row_weights)
    return _best_of_groups(w, inverse, pattern.n, pattern.m)


def removal_costs(w: np.ndarray, inverse: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """The cost of removing each of S sets of columns from each row jointly, float64 ``(M, S)``.

    ``sets`` ``(S, d)`` are column numbers, ``inverse`` ``(k, k)`` the inverse Hessian.

    >>> removal_costs(np.array([[2.0, 3.0]]), np.diag([1.0, 0.5]), np.array([[0], [1]])).tolist()
    [[4.0, 18.0]]
    """
    systems = np.linalg.inv(inverse[sets[:, :, None], sets[:, None, :]])
    removed = w[:, sets]
    return np.einsum("msd,sde,mse->ms", removed, systems, removed, optimize=True)


def joint_costs(w: np.ndarray, inverse: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """The cost ``(M,)`` of removing from each row its own set of columns jointly; ``removed`` is bool ``(M, k)``."""
    # Rows and columns that stay become those of the identity, and their weight 0, so that all systems have one size.
    both = removed[:, :, None] & removed[:, None, :]
    systems = np.where(both, inverse, np.eye(len(inverse)))
    target = np.where(removed, w, 0)
    return np.einsum("mk,mk->m", target, np.linalg.solve(systems, target[..., None])[..., 0])


def _best_of_groups(w: np.ndarray, inverse: np.ndarray, n: int, m: int) -> np.ndarray:
    """n of each m consecutive columns, the best set for each row and group on its own."""
    mask = np.empty(w.shape, bool)
    for start in range(0, w.shape[1], m):
        group = slice(start, min(start + m, w.shape[1]))
        mask[:, group] = _best(w[:, group], inverse[group, group], n, np.arange(len(w)), np.ones(len(w)))
    return mask


def _best(w: np.ndarray, inverse: np.ndarray, n: int, blocks: np.ndarray, row_weights: np.ndarray) -> np.ndarray:
    """The n columns that rows of one block keep together; ``blocks`` ``(M,)`` ascending numbers of each row's block."""
    k = w.shape[1]
    if k <= n:
        return np.ones(w.shape, bool)
    starts = np.flatnonzero(np.diff(blocks, prepend=-1))
    if comb(k, n) > _MOST_SETS:
        worth = np.add.reduceat(row_weights[:, None] * w**2 / np.diag(inverse), starts)
        kept = np.argsort(-worth, axis=1, kind="stable")[:, :n]
        mask = np.zeros(worth.shape, bool)
        np.put_along_axis(mask, kept, True, axis=1)
        return mask[blocks]
    keeps = np.array(list(combinations(range(k), n)))
    drops = np.array([np.setdiff1d(np.arange(k), keep) for keep in keeps])
    costs = np.add.reduceat(row_weights[:, None] * removal_costs(w, inverse, drops), starts)
    mask = np.zeros((len(keeps), k), bool)
    np.put_along_axis(mask, keeps, True, axis=1)
    return mask[costs.argmin(axis=1)][blocks]


def _choose_columns(w: np.ndarray, inverse: np.ndarray, pattern: VNM, row_weights: np.ndarray) -> np.ndarray:
    """Four columns for each block of v rows, then two of them in each row."""
    mask = _best(w, inverse, 4, np.arange(len(w)) // pattern.v, row_weights)
    for block in np.unique(mask, axis=0):
        rows, columns = (mask == block).all(axis=1), np.flatnonzero(block)
        # What the other columns held is gone, so the four are left with the inverse Hessian of a problem without them.
        gone = np.flatnonzero(~block)
        moves = inverse[np.ix_(columns, gone)] @ np.linalg.inv(inverse[np.ix_(gone, gone)])
        left = inverse[np.ix_(columns, columns)] - moves @ inverse[np.ix_(gone, columns)]
        moved = w[np.ix_(rows, columns)] - w[np.ix_(rows, gone)] @ moves.T
        mask[np.ix_(rows, columns)] = _best_of_groups(moved, left, 2, 4)
    return mask


def _choose_rows(w: np.ndarray, inverse: np.ndarray, pattern: Samoyeds, row_weights: np.ndarray) -> np.ndarray:
    """2:4 in every row, then the n of every m sub-rows for which going costs the most more than staying does."""
    mask = _best_of_groups(w, inverse, 2, 4)
    gain = row_weights * (joint_costs(w, inverse, np.ones_like(mask)) - joint_costs(w, inverse, ~mask))
    groups = -(-len(w) // pattern.m)
    padded = np.full(groups * pattern.m, -np.inf)
    padded[: len(w)] = gain
    order = np.argsort(-padded.reshape(groups, pattern.m), axis=1, kind="stable")[:, : pattern.n]
    kept = np.zeros((groups, pattern.m), bool)
    np.put_along_axis(kept, order, True, axis=1)
    return mask & kept.reshape(-1)[: len(w), None]
