"""Which modules have no doctests to collect without the package that they stand on."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("numba_cuda") else ["nmsparse/cuda/tile/gpu/*", "nmsparse/cuda/ptx/numba_glue.py"]
