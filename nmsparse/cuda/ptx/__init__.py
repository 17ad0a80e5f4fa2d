"""PTX instructions as data, by family; :mod:`nmsparse.cuda.ptx.numba_glue` makes them callable in Numba kernels.

===============  =====================================================================================
``wgmma``        warpgroup products, dense and sparse, and their groups
``mma``          warp products, dense and sparse
``matrix``       8×8 matrices between shared memory and registers: ldmatrix, stmatrix, movmatrix
``copy``         cp.async, bulk copies and tensor copies in both directions, multicast
``barrier``      mbarrier, named barriers, cluster barriers, waits between grids
``memory``       loads, stores, atomics, fences, conversions, redux, vote, setmaxnreg
``warp``         shuffles and reductions over the lanes of a warp
``arithmetic``   additions under a predicate
===============  =====================================================================================

The only folder with PTX text. Each file is plain Python without a GPU library, so another front end can use it.
"""
