"""The CPU backend: kernels compiled by Numba. The only place that imports it; ``ops`` and ``moe`` call in from above.

===============  ======================================================================================
``simd``         vectors as values, one LLVM instruction a word: what the kernels below are written in
``threads``      a team of waiting threads that share the tasks of one call
``operand``      every format as one of two structures that the kernels can multiply
``narrow``       few tokens: one pass over the weights, lanes along K
``wide``         many tokens: lanes along the tokens, the weights decoded once for all of them
``matmul``       cuts a problem into tiles, chooses narrow or wide for each, runs them
``activations``  what stands between the two projections of an expert
``moe``          the forward pass of a layer of experts
``pack``         prune and pack in one pass
===============  ======================================================================================
"""
