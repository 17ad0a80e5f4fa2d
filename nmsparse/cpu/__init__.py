"""The CPU backend: kernels compiled by Numba. The only place that imports it; ``ops`` and ``moe`` call in from above.

===============  ======================================================================================
``simd``         vectors as values, one LLVM instruction a word: what the kernels are written in
``pick``         the word that reads the two metadata bits; ``llvm``: what both are made of
``threads``      a team of threads that share the tasks of one call; ``doorbell``: how, without Python
``storage``      16-bit floats as integers; ``operand``: every format as one of two structures
``planes``       what the stored values of a row can meet, laid out for ``pick``
``narrow``       few tokens: lanes along K, each weight read once
``panel``        tokens transposed; ``decode``: a row of weights as values and offsets into the panel
``wide``         many tokens: lanes along the tokens
``matmul``       cuts a problem into tiles, chooses narrow or wide for each, runs them
``activations``  what stands between the two projections of an expert
``moe``          the forward pass of a layer of experts
``pack``         prune and pack in one pass
===============  ======================================================================================
"""
