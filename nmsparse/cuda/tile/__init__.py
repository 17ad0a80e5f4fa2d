"""The vocabulary that kernels are written in, twice: on the GPU with Numba CUDA, and on NumPy, word for word.

The same kernel text compiles for the GPU and runs on its CPU twin. This page is the vocabulary of
:mod:`nmsparse.cuda.kernels.gemm` (``gpu``; the twin is ``cpu``, which checks every rule below); the other
families explain theirs where it is defined.

Memory space is in the names: ``w_gmem``, ``x_gmem``, ``y_gmem``, ``bias_gmem``, ``partial_gmem`` and ``flag_gmem`` lie
in global memory, ``ring`` in shared memory, ``acc`` in registers. ``turn`` counts the steps of k that a CTA has gone
through; with S stages a step uses ``slot = turn % S`` for the ``turn // S``-th time. A tile is ``TM =
64·warpgroups·blocks`` rows by ``TT = tile_t`` tokens, a step ``TK = tile_k`` columns, a packed block 64 × 64
(:mod:`nmsparse.cuda.layout`). After each word, who may say it: the *producer*'s elected thread, each *consumer*
warpgroup, or *all*.

**Places**, integers (:mod:`nmsparse.cuda.schedule`)

``role()`` : all
    ``PRODUCER`` (-1), or the number of the consumer, from 0.
``elect()`` : all
    True in one thread of the producer.
``grid(rows, tokens, k_blocks)`` : all
    ``⌈rows / (TM·cluster)⌉, ⌈tokens / TT⌉, 64·k_blocks / TK``: tiles of rows, tiles of tokens, steps.
``pieces(tiles, split, parts)`` : all
    Number of pieces of work of this CTA: whole tiles, and perhaps one part of a split one.
``piece(index, tiles, split, parts, steps)`` : all
    ``number, first, last``: a tile and its steps ``first ≤ step < last``.
``place(number, row_tiles, token_tiles)`` : all
    ``row, token``: the tile's rows begin at ``TM·row``, its tokens at ``TT·token``.

**The ring**, which hands slots from the producer to the consumers

``ring()`` : all
    S slots with two barriers each; returns when all roles of the cluster are there. A phase of ``full`` is complete
    after one arrival and the bytes that it announces, of ``empty`` after an arrival of every consumer warp of the
    cluster.
``prefetch(x_gmem)`` : all
    Nothing; the tensor map of X will be needed soon.
``give_registers()`` : producer
    From here on its threads have ``producer_registers``.
``take_registers()`` : consumer
    From here on its threads have ``consumer_registers``.
``wait_empty(ring, turn)`` : producer
    Until ``empty[slot]`` has completed ``turn // S`` phases; the first time that is at once.
``expect(ring, turn, row, rows)`` : producer
    ``full[slot]`` completes after ``2·TT·TK + 4608·TK/64·(64-row blocks of the tile that exist)`` bytes.
``load_tokens(ring, turn, x_gmem, token, step)`` : producer
    ``tokens[slot] = x_gmem[TT·token :, TK·step :][:TT, :TK]``, zeros outside of X, swizzled
    (:func:`~nmsparse.formats.fragments.swizzle_128b`). Each CTA of a cluster brings its share for all of them.
``load_weights(ring, turn, w_gmem, row, step, rows, k_blocks)`` : producer
    ``weights[slot, b] = w_gmem[TM/64·row + b, TK/64·step :][: TK/64]`` for each block b of 64 rows that exists.
``wait_full(ring, turn)`` : consumer
    Until ``full[slot]`` has completed ``turn // S + 1`` phases.
``release(ring, turn)`` : consumer
    Arrives at ``empty[slot]`` of every CTA of the cluster.
``finish()`` : all
    Until no CTA of the cluster writes to another any more.

**Sums**: ``acc[m, t]`` of the consumer's ``64·blocks`` rows, held by its 128 threads as
:func:`~nmsparse.formats.fragments.wgmma_sp_d` says. While a group is under way only ``wgmma_sp`` may touch them.

``accumulator()`` : consumer
    ``acc``, undefined.
``zero(acc)`` : consumer
    ``acc[:] = 0``.
``wgmma_sp(acc, ring, turn)`` : consumer
    Starts ``acc += weights[slot] @ tokens[slot].T`` as one asynchronous group.
``wait_wgmma_but_one()`` : consumer
    Until all groups but the newest are done.
``wait_wgmma()`` : consumer
    Until all groups are done.
``store_partial(acc, partial_gmem, flag_gmem)`` : consumer
    ``partial[CTA, consumer] = acc``, then ``flag[CTA, consumer] = 1``.
``add_partials(acc, partial_gmem, flag_gmem, split, parts)`` : consumer
    ``acc += partial[c, consumer]`` for the CTAs c with parts 1, 2, … of the tile, in this order, each once
    ``flag[c, consumer] == 1``; the flag is 0 afterwards.
``store(acc, ring, y_gmem, bias_gmem, row, token, rows, tokens, pitch)`` : consumer
    ``y[TT·token + t, M + m] = acc[m, t] + bias[M + m]``, rounded, where M is the consumer's first row; only inside
    ``tokens × rows``. ``y[t, m]`` is ``y_gmem[t·pitch + m]``.
"""
