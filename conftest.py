"""Which modules have no doctests to collect without the package that they stand on."""

from importlib.util import find_spec

STAND_ON = {
    "numba_cuda": ["nmsparse/cuda/tile/gpu/*", "nmsparse/cuda/ptx/numba_glue.py"],
    "torch": ["nmsparse/torch/*"],
    "transformers": ["nmsparse/torch/hf/*"],
    "triton": ["nmsparse/bench/moe/triton_*.py"],
}
collect_ignore_glob = [path for package, paths in STAND_ON.items() if not find_spec(package) for path in paths]
