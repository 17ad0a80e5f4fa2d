"""Every kernel once, on small odd shapes, checked against NumPy; for the CUDA memory and race checkers.

compute-sanitizer --tool memcheck python tests/cuda/sanitizer.py
compute-sanitizer --tool racecheck python tests/cuda/sanitizer.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import nmsparse
from nmsparse.cuda import matmul
from nmsparse.cuda.array import from_host
from nmsparse.cuda.choose import H200, Plan, Problem, candidates, gemv_plan
from nmsparse.cuda.config import SHIPPED, SHIPPED_GEMV, SHIPPED_GEMV_SAMOYEDS, SHIPPED_SAMOYEDS, GemmConfig
from nmsparse.cuda.config_mma import MmaConfig
from nmsparse.moe import SparseExperts

ROWS, COLUMNS = 200, 392


def kinds(config: GemmConfig | MmaConfig, problem: Problem) -> list[Plan]:
    """A plan of whole tiles, one that splits some, one in clusters."""
    found: dict[tuple[bool, bool], Plan] = {}
    for plan in candidates(config, problem, H200):
        found.setdefault((plan.split > 0, plan.cluster > 1), plan)
    return [*found.values()]


def plans(tokens: int) -> list[Plan]:
    """A plan of each kind: whole and split tiles, one CTA and clusters, each kernel."""
    problem = Problem(ROWS, tokens, COLUMNS, bias=True)
    configs = [replace(config, bias=True) for config in (SHIPPED[0], SHIPPED[2], SHIPPED[-1])]
    configs += [MmaConfig(64, 16, 128, 4, 1, 3, bias=True), MmaConfig(64, 16, 128, 4, 1, 3, bias=True, vector=False)]
    few = gemv_plan(replace(SHIPPED_GEMV[0], bias=True), problem, H200)
    return [few] + [plan for config in configs for plan in kinds(config, problem)]


def main() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((ROWS, COLUMNS)).astype(np.float16)
    host = nmsparse.array(w, "2:4")
    weight = nmsparse.array(from_host(w), "2:4")
    for name, buffer in host.buffers().items():
        np.testing.assert_array_equal(weight.buffers()[name].numpy(), buffer)
    np.testing.assert_array_equal(weight.todense().numpy(), host.todense())
    bias = rng.standard_normal(ROWS).astype(np.float16)
    for tokens in (5, 70):
        x = rng.standard_normal((tokens, COLUMNS)).astype(np.float16)
        want = x.astype(np.float64) @ host.todense().astype(np.float64).T + bias
        for plan in plans(tokens):
            y = from_host(np.full((tokens, ROWS), np.nan, np.float16))
            matmul.matmul(from_host(x), weight, out=y, bias=from_host(bias), config=plan)
            error = np.abs(y.numpy() - want).max()
            print(f"{tokens} tokens, {plan.describe()}: largest error {error:.3f}")
            assert error < 0.1
    thin = nmsparse.array(w, "vnm:64:2:8").to_device("cuda")
    y = (from_host(x) @ thin.T).numpy()
    assert np.abs(y - x.astype(np.float64) @ thin.to_device("cpu").todense().astype(np.float64).T).max() < 0.1
    print("V:N:M agrees")
    samoyeds(rng)
    experts(rng)


def samoyeds(rng: np.random.Generator) -> None:
    """Two and three consumers, both ring depths; whole and split tiles, and clusters; the kernel for few tokens."""
    w = nmsparse.array(rng.standard_normal((300, 640)).astype(np.float16), "samoyeds:1:2:128")
    weight, bias = w.to_device("cuda"), rng.standard_normal(300).astype(np.float16)
    for tokens in (5, 140):
        x = rng.standard_normal((tokens, 640)).astype(np.float16)
        want = x.astype(np.float64) @ w.todense().astype(np.float64).T + bias
        medium = next(c for c in SHIPPED_SAMOYEDS if (c.warpgroups, c.tile_t, c.tile_k) == (2, 64, 128))
        problem = Problem(300, tokens, 640, bias=True, run=128)
        plans = [gemv_plan(replace(SHIPPED_GEMV_SAMOYEDS[0], bias=True), problem, H200)]
        for shipped in (SHIPPED_SAMOYEDS[0], SHIPPED_SAMOYEDS[1], medium, SHIPPED_SAMOYEDS[-1]):
            plans += kinds(replace(shipped, bias=True), problem)
        for plan in plans:
            y = from_host(np.full((tokens, 300), np.nan, np.float16))
            matmul.matmul(from_host(x), weight, out=y, bias=from_host(bias), config=plan)
            error = np.abs(y.numpy() - want).max()
            print(f"{tokens} tokens, {plan.describe()}: largest error {error:.3f}")
            assert error < 0.1


def experts(rng: np.random.Generator) -> None:
    """Routing, both grouped kernels, combining."""
    shapes = (4, 2 * 136, 264), (4, 264, 136)
    for pattern in ("samoyeds:1:2:128", "2:4"):
        held = [nmsparse.array(rng.standard_normal(s).astype(np.float16) / 16, pattern) for s in shapes]
        layer = SparseExperts(*(a.to_device("cuda") for a in held))
        for tokens in (3, 150):
            x = rng.standard_normal((tokens, 264)).astype(np.float16)
            ids = np.argsort(rng.random((tokens, 4)), axis=1)[:, :2].astype(np.int32)
            weights = rng.random((tokens, 2)).astype(np.float32)
            y = layer(*(from_host(np.ascontiguousarray(a)) for a in (x, ids, weights))).numpy()
            want = nmsparse.reference.moe(x, ids, weights, *held)
            error = np.abs(y - want).max() / np.abs(want).max()
            print(f"experts {pattern}, {tokens} tokens: largest error {error:.4f}")
            assert error < 0.02


if __name__ == "__main__":
    main()
