"""What each pattern keeps, one element at a time in plain Python: written from the definition, not from the code."""

from __future__ import annotations

import math

import numpy as np

from nmsparse.formats import NM, VNM, Pattern


def best(scores: list[float], n: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n])


def kept(w: np.ndarray, pattern: Pattern, scores: np.ndarray | None = None) -> np.ndarray:
    """Bool mask of what ``pattern`` keeps of ``w`` ``(M, K)``."""
    rows, cols = w.shape
    if scores is None:
        scores = [[math.inf if math.isnan(x) else abs(float(x)) for x in row] for row in w.tolist()]
    mask = np.zeros((rows, cols), bool)

    def score(r: int, c: int) -> float:
        return float(scores[r][c]) if r < rows and c < cols else -math.inf

    def keep(r: int, c: int) -> None:
        if r < rows and c < cols:
            mask[r, c] = True

    def worth(values: list[float]) -> float:
        total = 0.0
        for value in values:
            total += 0.0 if value == -math.inf else value
        return total

    if isinstance(pattern, NM):
        for r in range(rows):
            for c in range(0, cols, pattern.m):
                for j in best([score(r, c + j) for j in range(pattern.m)], pattern.n):
                    keep(r, c + j)
    elif isinstance(pattern, VNM):
        for top in range(0, rows, pattern.v):
            block = range(top, min(top + pattern.v, rows))
            for c in range(0, cols, pattern.m):
                sums = [
                    worth([score(r, c + j) for r in block]) if c + j < cols else -math.inf for j in range(pattern.m)
                ]
                columns = best(sums, 4)
                for r in block:
                    for p in best([score(r, c + j) for j in columns], 2):
                        keep(r, c + columns[p])
    else:
        for top in range(0, rows, pattern.m):
            for left in range(0, cols, pattern.v):
                quads = range(left, min(left + pattern.v, cols), 4)
                pairs = {
                    (r, c): best([score(r, c + j) for j in range(4)], 2)
                    for r in range(top, top + pattern.m)
                    for c in quads
                }
                totals = [
                    worth([worth([score(r, c + j) for j in pairs[r, c]]) for c in quads]) if r < rows else -math.inf
                    for r in range(top, top + pattern.m)
                ]
                for i in best(totals, pattern.n):
                    for c in quads:
                        for j in pairs[top + i, c]:
                            keep(top + i, c + j)
    return mask


def legal(mask: np.ndarray, pattern: Pattern) -> bool:
    """Whether ``mask`` ``(M, K)`` keeps no more than ``pattern`` allows."""
    rows, cols = mask.shape
    if isinstance(pattern, NM):
        return all(mask[:, c : c + pattern.m].sum(1).max() <= pattern.n for c in range(0, cols, pattern.m))
    if isinstance(pattern, VNM):
        blocks = [
            mask[r : r + pattern.v, c : c + pattern.m]
            for r in range(0, rows, pattern.v)
            for c in range(0, cols, pattern.m)
        ]
        return all(b.any(0).sum() <= 4 and b.sum(1).max() <= 2 for b in blocks)
    quads = all(mask[:, c : c + 4].sum(1).max() <= 2 for c in range(0, cols, 4))
    blocks = [
        mask[r : r + pattern.m, c : c + pattern.v] for r in range(0, rows, pattern.m) for c in range(0, cols, pattern.v)
    ]
    return quads and all(b.any(1).sum() <= pattern.n for b in blocks)
