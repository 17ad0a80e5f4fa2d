"""The vocabulary that kernels are written in, twice: on the GPU with Numba CUDA, and on NumPy, word for word.

The same kernel text compiles for the GPU and runs on its CPU twin. This page is the vocabulary of the kernels on
``wgmma`` and of those for few tokens (``gpu``; the twin is ``cpu``, which checks every rule below); the other families
explain theirs where it is defined.

Memory space is in the names: what ends in ``_gmem`` lies in global memory, ``ring`` in shared memory, ``acc`` in
registers. ``turn`` counts the steps of k that a CTA has gone through; with S stages a step uses ``slot = turn % S`` for
the ``turn // S``-th time. A tile is TM rows by ``TT = tile_t`` tokens, a step ``TK = tile_k`` columns, a packed block
64 × 64 (:mod:`nmsparse.cuda.layout`). After each word, who may say it: the *producer*'s elected thread, each *consumer*
warpgroup, or *all*.

2:4: :mod:`nmsparse.cuda.kernels.gemm`
======================================

``TM = 64·warpgroups·blocks``.

**Places**, integers (:mod:`nmsparse.cuda.schedule`)

``role()`` : all
    ``PRODUCER`` (-1), or the number of the consumer, from 0.
``elect()`` : all
    True in one thread of the producer.
``grid(rows, tokens, k_blocks)`` : all
    ``⌈rows / TM⌉, ⌈tokens / TT⌉, 64·k_blocks / TK``: tiles of rows, tiles of tokens, steps.
``cluster(split, parts)`` : all
    How many CTAs, which form a cluster, share each tile along k: ``parts`` where no tile is split. Such a cluster has
    one tile.
``pieces(tiles, split, parts)`` : all
    Number of pieces of work of this CTA: whole tiles, and perhaps one part of a split one.
``piece(index, tiles, split, parts, steps)`` : all
    ``number, first, last``: a tile and its steps ``first ≤ step < last``.
``place(number, row_tiles, token_tiles)`` : all
    ``row, token``: the tile's rows begin at ``TM·row``, its tokens at ``TT·token``.

**The ring**, which hands slots from the producer to the consumers

``ring()`` : all
    S slots with two barriers each; returns when all roles of the CTA are there. A phase of ``full`` is complete after
    one arrival and the bytes that it announces, of ``empty`` after an arrival of every thread of every consumer.
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
    (:func:`~nmsparse.formats.fragments.swizzle_128b`).
``load_weights(ring, turn, w_gmem, row, step, rows, k_blocks)`` : producer
    ``weights[slot, b] = w_gmem[TM/64·row + b, TK/64·step :][: TK/64]`` for each block b of 64 rows that exists.
``wait_full(ring, turn)`` : consumer
    Until ``full[slot]`` has completed ``turn // S + 1`` phases.
``release(ring, turn)`` : consumer
    Arrives at ``empty[slot]``.

**Sums**: ``acc[m, t]`` of the consumer's ``64·blocks`` rows, held by its 128 threads as
:func:`~nmsparse.formats.fragments.wgmma_sp_d` says. While a group is under way only ``wgmma_sp`` may touch them.

``accumulator()`` : consumer
    ``acc``, undefined.
``wgmma_sp(acc, ring, turn, before)`` : consumer
    Starts ``acc = (acc if before else 0) + weights[slot] @ tokens[slot].T`` as one asynchronous group, ``before`` steps
    after the first. Metadata stay in registers while it runs: of 2:4 in those of even or of odd steps.
``wait_wgmma_but_one()`` : consumer
    Until all groups but the newest are done.
``wait_wgmma()`` : consumer
    Until all groups are done.
``store_partial(acc, partial_gmem, flag_gmem)`` : consumer
    ``partial[CTA, consumer] = acc``, then ``flag[CTA, consumer] = 1``.
``add_partials(acc, partial_gmem, flag_gmem, split, parts)`` : consumer
    ``acc += partial[c, consumer]`` for the CTAs c with parts 1, 2, … of the tile, in this order, each once
    ``flag[c, consumer] == 1``; the flag is 0 afterwards.
``reduce_scatter(acc, ring, cluster)`` : consumer
    ``acc[m] = Σ acc[m]`` of the same consumers in all CTAs of the cluster, for the rows m of warps that this CTA owns
    (:func:`~nmsparse.cuda.schedule.owner_of`); others are lost. Sums cross the shared memory of the rings, which nobody
    may need any more.
``store(acc, ring, y_gmem, bias_gmem, row, token, rows, tokens, pitch, cluster)`` : consumer
    ``y[TT·token + t, M + m] = acc[m, t] + bias[M + m]``, rounded, where M is the consumer's first row; only inside
    ``tokens × rows``, and in a cluster only rows of warps that this CTA owns. ``y[t, m]`` is ``y_gmem[t·pitch + m]``.

Samoyeds: :mod:`nmsparse.cuda.kernels.samoyeds`
===============================================

The words above, but for ``wait_wgmma_but_one``, and those below. ``TM = 128·warpgroups``: the packed row r of the 64
that a consumer has is the sub-row of its output rows 2r and 2r + 1, and ``expect`` and ``load_weights`` count packed
blocks, each of which stands for 128 rows of Y. ``acc`` is two matrices of 64 × TT: ``sums``, which ``wgmma_sp`` adds
to, and ``even``. At the end, ``acc[2r]`` is ``even[r]`` and ``acc[2r + 1]`` is ``sums[r] - even[r]`` to ``store``; the
words of partial sums take both matrices. ``store`` writes by a buffer in shared memory.

**Runs** of V columns, for each of which a sub-row belongs to one of its two rows

``run_of(step, run_steps)`` : all
    ``run, left``: the run that ``step`` is in, and how many of its ``run_steps`` steps are left.
``zero(acc)`` : consumer
    ``even = 0``.
``picks(picks_gmem, row, rows, runs)`` : consumer
    Which rows of ``picks_gmem`` ``(sub-rows, runs)`` are those of this tile; beyond the last, the last.
``pick(picks, run)`` : consumer
    ``odd[r] = picks[r, run]``: 1 if the sub-row r belongs to its odd row in this run, 0 if to its even row.
``end_run(acc, odd, following)`` : consumer
    ``even[r] += sums[r]·(following[r] - odd[r])``, where ``odd`` is of the run that ends, ``following`` of the next.
``end_runs(acc, odd)`` : consumer
    ``even[r] += sums[r]·(1 - odd[r])`` after the last run.

All experts: :mod:`nmsparse.cuda.kernels.grouped`
=================================================

The words for the ring, the sums and runs that the text says are those above; the others are below. ``TM =
64·warpgroups`` packed rows. Of ``gated`` weights these are eight gate rows, their eight up rows, and so on
(:func:`~nmsparse.cuda.layout.interleaved`), so a tile has half as many outputs; of Samoyeds it has twice as many.
``plan_gmem`` is ``ends, tile_ends``, E of each: expert e has the positions from ``ends[e - 1]`` up to ``ends[e]``, and
``⌈positions / TT⌉`` tiles of tokens. Of a ``part`` it is E + 1 pairs of both, the first of which says where the part
begins; tiles count from there. With ``gather``, the token of a position s is ``x_gmem[rows_gmem[s]]``; without,
``x_gmem[s]``.

``await_previous()`` : all
    Until the launch before this one is complete; said before anything in global memory is read or written.
``begin_next()`` : all
    The next launch may begin, and await the end of this one (:func:`nmsparse.cuda.launch.overlaps`).
``share(tiles)`` : all
    How many of the tiles this CTA has (:func:`~nmsparse.cuda.schedule.share`).
``nth(index)`` : all
    Which: their numbers (:func:`~nmsparse.cuda.schedule.nth`).
``grid(row_blocks, k_blocks)`` : all
    ``⌈row_blocks / warpgroups⌉, 64·k_blocks / TK``: tiles of rows, steps.
``tiles(plan_gmem, experts, row_tiles)`` : all
    ``tile_ends[E - 1]·row_tiles``, which the device alone knows.
``place(number, row_tiles, plan_gmem, experts)`` : all
    ``expert, row, first, end``: a tile's rows begin at ``TM·row``, its positions at ``first``; the expert's go up to
    ``end``. Tiles of one expert follow each other.
``token_registers()`` : producer
    ``tokens``, undefined.
``find_tokens(tokens, rows_gmem, first, end, x_pitch)`` : producer
    ``tokens`` are those of the positions from ``first`` on, TT at most and none from ``end`` on. Rows of X are
    ``x_pitch`` elements apart, a multiple of 8 if they are gathered.
``load_weights(ring, turn, w_gmem, expert, row, step, row_blocks, k_blocks)`` : producer
    ``weights[slot] = w_gmem[expert, TM·row :, TK·step :][:TM, :TK]``, as packed blocks, of which only those that exist
    are brought, or dense, swizzled. ``full[slot]`` completes after their bytes, and those of the tokens unless these
    are gathered.
``load_tokens(ring, turn, x_gmem, tokens, step, columns)`` : producer
    ``tokens[slot] = x[:, TK·step :][:, :TK]``, where x is the rows of X that ``find_tokens`` found, zeros from
    ``columns`` on; swizzled. Where there is no token, what lies in the slot stays. All 128 threads of the producer
    gather, and are elected for it: ``full[slot]`` counts an arrival of each when its copies have landed.
``picks(picks_gmem, expert, row, rows, runs)`` : consumer
    As above, in ``picks_gmem`` ``(experts, rows, runs)``.
``multiply(acc, ring, turn, before)`` : consumer
    ``wgmma_sp``, or ``wgmma`` of dense weights.
``multiply_few(acc, ring, turn, before)`` : consumer
    The same with the first TT/2 tokens of the slot only, from TT = 64 on; the sums of the others are undefined.
``store(acc, ring, y_gmem, row, first, end, outputs, pitch)`` : consumer
    ``y[first + t, M + m] = act(acc)[m, t]``, rounded, where M is the consumer's first output, and act of gated weights
    the product of ``act`` of a gate row and its up row; only before ``end`` and ``outputs``.

Few tokens: :mod:`nmsparse.cuda.kernels.gemv`
=============================================

Each *warp* says these words; its 32 lanes hold the operands of ``mma.sp`` together (:mod:`nmsparse.formats.fragments`).
A CTA has a *slab* of 16 packed rows and TT tokens. Its warps take turns at ``batch`` blocks of 64 columns each, in
rounds of ``BLOCKS_A_ROUND = warps·batch``.

``place(tokens)`` : warp
    ``slab, first``: the CTA's packed rows begin at ``16·slab``, its tokens at ``first``.
``first_block()`` : warp
    ``batch`` times the number of the warp.
``accumulator()`` : warp
    ``acc``, sums of 16 packed rows by TT tokens, of Samoyeds of both rows of a pair; undefined.
``weight_registers()`` : warp
    ``a``, values of ``batch`` blocks, undefined.
``meta_registers()`` : warp
    ``e``, their metadata, undefined.
``pick_registers()`` : warp
    ``odd``, their picks, undefined.
``zero(acc)`` : warp
    ``acc = 0``.
``picks(picks_gmem, slab, rows, runs)`` : warp
    Which rows of ``picks_gmem`` ``(sub-rows, runs)`` are those of the slab; beyond the last, the last.
``load_weights(a, e, w_gmem, slab, block, k_blocks)`` : warp
    ``w = w_gmem[16·slab :, 64·block :][:16, : 64·batch]``, as values ``a`` and metadata ``e``; zeros from ``k_blocks``
    on.
``load_picks(odd, picks, block, run_blocks, runs)`` : warp
    ``odd[r, i] = picks[r, (block + i) // run_blocks]``, of the last run beyond it. Nothing where nothing is picked.
``load_tokens(x_gmem, first, block, tokens, columns, x_pitch)`` : warp
    Begins to copy ``x[first :, 64·block :][:TT, : 64·batch]`` into the warp's shared memory, zeros from ``columns`` on,
    undefined from ``tokens`` on; ``x[t, k]`` is ``x_gmem[t·x_pitch + k]``.
``wait_tokens()`` : warp
    Until the copies have landed.
``mma_sp(acc, a, e, odd)`` : warp
    ``acc += w · xᵀ``; of Samoyeds to the even or to the odd row of the pair, as ``odd`` says for each block.
``share(acc)`` : warp
    Puts ``acc`` into shared memory, in the place of the tokens.
``barrier()`` : warp
    Until all warps of the CTA are here.
``store(y_gmem, bias_gmem, slab, first, rows, tokens, y_pitch)`` : warp
    ``y[first + t, m] = Σ acc[m, t] + bias[m]`` over the warps in their order, rounded; only inside ``tokens × rows``.

Few tokens of all experts: :mod:`nmsparse.cuda.kernels.gemv_grouped`
====================================================================

The words above, those about launches and the plan from the section on all experts, where a tile of rows is a slab, and:

``number()`` : warp
    Of the CTA.
``weights_of(w_gmem, expert, row_blocks, k_blocks)`` : warp
    ``w_gmem[expert]``, in which ``load_weights`` finds the slab.
``picks(picks_gmem, expert, slab, rows, runs)`` : warp
    As above, in ``picks_gmem`` ``(experts, rows, runs)``.
``sources(rows_gmem, first, end, x_pitch)`` : warp
    Where the rows of X begin that the positions from ``first`` on have, TT at most and none from ``end`` on.
``load_tokens(x_gmem, sources, block, columns)`` : warp
    As above, of these rows.
``store(y_gmem, slab, first, end, outputs, y_pitch)`` : warp
    ``y[first + t, m] = act(Σ acc)[m, t]`` over the warps in their order, rounded, where act of gated weights is the
    product of ``act`` of a gate row and its up row; only before ``end`` and ``outputs``.
"""
