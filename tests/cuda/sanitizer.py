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
from nmsparse.cuda.config import SHIPPED, SHIPPED_GEMV
from nmsparse.cuda.config_mma import MmaConfig

ROWS, COLUMNS = 200, 392


def plans(tokens: int) -> list[Plan]:
    """A plan of each kind: whole and split tiles, one CTA and clusters, each kernel."""
    problem = Problem(ROWS, tokens, COLUMNS, bias=True)
    configs = [replace(config, bias=True) for config in (SHIPPED[0], SHIPPED[2], SHIPPED[-1])]
    configs += [MmaConfig(64, 16, 128, 4, 1, 3, bias=True), MmaConfig(64, 16, 128, 4, 1, 3, bias=True, vector=False)]
    few = [gemv_plan(replace(SHIPPED_GEMV[0], bias=True), problem, H200)] if tokens <= 8 else []
    return few + [plan for config in configs for plan in list(candidates(config, problem, H200))[:3:2]]


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


if __name__ == "__main__":
    main()
