"""Which pattern each expert gets, under one budget for the whole model: an integer program."""

from __future__ import annotations

import math

import numpy as np

from ...errors import NMSparseError, require
from ...formats import CLASSES, parse


def allocate(losses: np.ndarray, costs: np.ndarray, budget: float, *, gap: float = 0.0) -> np.ndarray:
    """One choice per unit with the least total loss whose total cost is at most ``budget``: (U,) int64.

    A unit is an expert of a layer, a choice is what may become of it: dense, 2:4, Samoyeds, V:N:M, fewer neurons, drop.
    ``losses`` (U, C) is what choice c of unit u adds to the loss, ``costs`` (U, C) or (C,) what it takes: bytes
    (:func:`expert_bytes`) or seconds. +inf forbids a choice: to keep the guarded experts dense, set
    ``losses[guard, 1:] = inf``. Losses may be negative; costs are 0 or more.

    ``gap`` is the part of the optimum that the solver may lose (0: none; 1e-4 is enough for thousands of experts and
    takes less time). The choice meets the budget to 1e-9 of it. Losses of units are taken to add up, which is a
    first-order truth: measure the result. GEMQ's losses are those of :func:`output_loss`; losses that were measured,
    one unit changed at a time, serve as well.

    Raises NMSparseError for an infeasible budget, with the least feasible one, and for NaN. Needs scipy (milp, HiGHS).
    GEMQ: "Global Expert-Level Mixed-Precision Quantization for MoE LLMs", ICML'26, arXiv:2605.23078, which chooses the
    bits of each expert so.

    >>> losses = np.array([[0.0, 1.0, 9.0], [0.0, 2.0, 3.0]])  # dense, 2:4, drop
    >>> allocate(losses, np.array([16, 9, 0]), budget=25).tolist()
    [1, 0]
    >>> allocate(losses, np.array([16, 9, 0]), budget=9).tolist()
    [1, 2]
    """
    losses, costs = np.asarray(losses, np.float64), np.asarray(costs, np.float64)
    if losses.ndim != 2 or np.isnan(losses).any() or np.isneginf(losses).any():
        raise NMSparseError(f"losses: expected numbers or +inf of shape (units, choices), got shape {losses.shape}")
    if costs.shape not in (losses.shape, losses.shape[1:]) or np.isnan(costs).any() or (costs < 0).any():
        raise NMSparseError(
            f"costs: expected numbers of 0 or more, shape {losses.shape} or {losses.shape[1:]}, got shape {costs.shape}"
        )
    costs = np.broadcast_to(costs, losses.shape)
    allowed = np.isfinite(losses) & np.isfinite(costs)
    if not allowed.any(axis=1).all():
        raise NMSparseError(
            f"unit {int(allowed.any(axis=1).argmin())}: expected a choice that is not forbidden by +inf"
        )
    losses, costs = np.where(allowed, losses, np.inf), np.where(allowed, costs, np.inf)
    cheapest = np.where(costs == costs.min(axis=1, keepdims=True), losses, np.inf).argmin(axis=1)
    units, slack = np.arange(len(losses)), 1e-9 * abs(budget)
    least = costs[units, cheapest].sum()
    if not least <= budget + slack:
        raise NMSparseError(f"budget: expected at least {least:g}, the cheapest choice of every unit; got {budget:g}")

    limit = budget
    while limit > least:
        choice = _solve(losses, costs, limit, gap)
        overspent = costs[units, choice].sum() - budget
        if overspent <= slack:
            return choice
        limit -= 2 * overspent  # HiGHS meets a constraint to 1e-6
    return cheapest


def output_loss(gradient: np.ndarray, output: np.ndarray, pruned: np.ndarray) -> float:
    """GEMQ's estimate of what a choice adds to the loss: Σ (∂loss/∂y)² (y − ŷ)² over tokens and outputs.

    ``gradient``, ``output`` (y) and ``pruned`` (ŷ) are (T, H), of the down projection of one expert over its tokens.
    Sums of batches add up.

    >>> output_loss(np.array([[1.0, 2.0]]), np.array([[3.0, 3.0]]), np.array([[2.0, 2.5]]))
    2.0
    """
    error = np.asarray(output, np.float64) - pruned
    return float(((np.asarray(gradient, np.float64) * error) ** 2).sum())


def expert_bytes(choice: str, hidden: int, width: int, dtype: object, *, gated: bool = True) -> int:
    """Bytes of one expert stored as ``choice``: ``"dense"``, ``"drop"`` or a pattern, metadata and padding included.

    ``width`` is I, after neurons are pruned. Equal to ``SparseExperts.nbytes`` of one expert.

    >>> [expert_bytes(choice, 256, 384, np.float16) for choice in ("dense", "2:4", "samoyeds:1:2:128", "drop")]
    [589824, 331776, 167040, 0]
    """
    shapes, item = (((2 if gated else 1) * width, hidden), (hidden, width)), np.dtype(dtype).itemsize
    if choice == "drop":
        return 0
    if choice == "dense":
        return sum(rows * cols * item for rows, cols in shapes)
    pattern = parse(choice)
    layouts = [CLASSES[pattern.format]._layout(pattern, *shape)[0].values() for shape in shapes]
    return sum(
        math.prod(size) * (np.dtype(kind).itemsize if kind else item) for layout in layouts for size, kind in layout
    )


def _solve(losses: np.ndarray, costs: np.ndarray, budget: float, gap: float) -> np.ndarray:
    """The optimum to the tolerances of HiGHS; losses and costs are scaled to about 1 for them. +inf is forbidden."""
    optimize, sparse = require("scipy.optimize", "bench"), require("scipy.sparse", "bench")
    (units, choices), allowed = losses.shape, np.isfinite(losses)
    regret = np.where(allowed, losses - losses.min(axis=1, keepdims=True), 0)
    one_each = sparse.kron(sparse.eye(units), np.ones((1, choices)))
    spent = sparse.csr_matrix(np.where(allowed, costs, 0).reshape(1, -1) / budget)
    result = optimize.milp(
        regret.ravel() / (regret.max() or 1),
        integrality=1,
        bounds=optimize.Bounds(0, allowed.ravel().astype(float)),
        constraints=[optimize.LinearConstraint(one_each, 1, 1), optimize.LinearConstraint(spent, -np.inf, 1)],
        options={"mip_rel_gap": gap},
    )
    if result.x is None:
        raise RuntimeError(f"scipy.optimize.milp found no choice where one exists: {result.message}")
    return result.x.reshape(units, choices).argmax(axis=1)
