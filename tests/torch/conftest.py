"""Settings for the tests of the bridge, which need torch and transformers: python -m pip install 'nmsparse[test]'."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

collect_ignore_glob = []
if find_spec("torch") and find_spec("transformers"):
    import torch

    torch.set_num_threads(1)  # its idle threads spin, and the kernels under test want the cores
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
