"""How threads share a job without Python: workers wait, run and go to sleep in compiled code, which holds no GIL.

The *bell* is an array of integers that the threads of a team watch. A caller hangs out a job, opens the gate and
rings. A worker that has just worked still looks at the bell and comes within a microsecond; one that has looked in
vain for some time sleeps on a lock, which the caller releases. Whoever finds the gate open enters. The caller takes
tasks too, and when none is left it closes the gate and waits for those inside: a worker that wakes too late finds it
closed and costs nothing.

The locks are the ones that Python's own are made of: they need no GIL, and they are the same on every system.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .llvm import LONG
from .operand import INLINED
from .simd import address, at, put

# Where the bell keeps what, each on a cache line of its own.
_RINGS = 0  # how often it rang
_GATE = 8  # threads inside, plus _OPEN
_TAKEN = 16  # whether a caller has the team; then the lock that it naps on
_JOB = 24  # a function; then its argument
_SEATS = 32  # of each worker: whether it sleeps; then the lock that wakes it
_SEAT = 8
_OPEN = 1 << 32

_X86 = platform.machine().lower() in ("x86_64", "amd64")
# Looks at the bell before a worker sleeps, 50 to 300 µs: enough from one product of a layer to the next, and short for
# a program that multiplies by NumPy in between, whose BLAS wants the core.
_LOOKS = 6_000 if _X86 else 50_000
_NAP = 20  # µs

_acquire = types.ExternalFunction("PyThread_acquire_lock", types.int32(types.int64, types.int32))
_nap = types.ExternalFunction("PyThread_acquire_lock_timed", types.int32(types.int64, types.int64, types.int32))
_release = types.ExternalFunction("PyThread_release_lock", types.void(types.int64))


def new_bell(workers: int, new_lock: Callable[[], int]) -> np.ndarray:
    """A bell for up to so many workers; ``new_lock()`` is the address of a lock that is held."""
    bell = np.zeros(_SEATS + _SEAT * workers, np.int64)
    bell[_TAKEN + 1] = new_lock()
    for worker in range(workers):
        bell[_SEATS + _SEAT * worker + 1] = new_lock()
    return bell


@njit(**INLINED)
def next_task(queue):
    """The number of a task, different for every thread that asks."""
    return change(queue, 0, 1)


@njit(cache=True, nogil=True)
def serve(bell, worker):
    """The life of a worker."""
    bell, rings = address(bell), 0
    while rings >= 0:
        rings = _await_ring(bell, _SEATS + _SEAT * worker, rings)
        if change(bell, _GATE, 1) >= _OPEN:
            call(at(bell, _JOB), at(bell, _JOB + 1))
        change(bell, _GATE, -1)


@njit(**INLINED)
def _await_ring(bell, seat, rings):
    """Return when the bell has rung more than ``rings`` times, with how often it has."""
    for _ in range(_LOOKS):
        if look(bell, _RINGS) != rings:
            return look(bell, _RINGS)
        pause()
    swap(bell, seat, 1)
    # It may have rung just before. If the caller has not seen this worker asleep, it stays up; else the lock is coming.
    if change(bell, _RINGS, 0) == rings or swap(bell, seat, 0) == 0:
        _acquire(at(bell, seat + 1), 1)
    return look(bell, _RINGS)


@njit(**INLINED)
def share(bell, wake, body, args):
    """Run ``body(queue, *args)`` here and on all workers that are awake, and return how many tasks they asked for.

    So many that sleep are woken; if ``wake`` is -1, or another call has the team, it runs on this thread alone.
    ``body`` asks for tasks (:func:`next_task`) until there are no more. What it raises is lost: the caller learns from
    the number of tasks that they are not done.
    """
    function, queue = closure(body, args)
    bell = address(bell)
    if wake >= 0 and swap(bell, _TAKEN, 1) == 0:
        put(bell, _JOB, function)
        put(bell, _JOB + 1, number_of(queue))
        change(bell, _GATE, _OPEN)
        change(bell, _RINGS, 1)
        for worker in range(wake):
            seat = _SEATS + _SEAT * worker
            if swap(bell, seat, 0):
                _release(at(bell, seat + 1))
        call(function, number_of(queue))
        change(bell, _GATE, -_OPEN)
        looks = 0
        while look(bell, _GATE) != 0:
            pause()
            looks += 1
            if looks > _LOOKS:  # a worker has lost its core in the middle of a task
                _nap(at(bell, _TAKEN + 1), _NAP, 0)
        swap(bell, _TAKEN, 0)
    else:
        call(function, number_of(queue))
    return look(queue, 0)


# --- words -----------------------------------------------------------------------------------------------------------


@intrinsic
def closure(typingctx, body, args):
    """``body`` and its arguments as two numbers for :func:`call`: a function, and the address of a queue with ``args``.

    Both live as long as the function that this is compiled into.
    """
    memory = types.CPointer(types.int64)
    signature = body.get_call_type(typingctx, (memory, *args.types), {})

    def codegen(context, builder, _, values):
        compiled = body.dispatcher.get_compile_result(signature)
        context.add_linking_libs([compiled.library])
        line = ir.ArrayType(LONG, 8)  # of the cache: every thread writes the queue, and nothing else is to suffer
        kind = ir.LiteralStructType([line, context.get_value_type(args)])
        job = cgutils.alloca_once(builder, kind)
        job.align = 64
        builder.store(ir.Constant(line, None), cgutils.gep_inbounds(builder, job, 0, 0))
        builder.store(values[1], cgutils.gep_inbounds(builder, job, 0, 1))
        queue = builder.bitcast(job, LONG.as_pointer())

        name = builder.module.get_unique_name("job")
        function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [LONG]), name)
        function.linkage = "internal"
        inside = ir.IRBuilder(function.append_basic_block())
        own = inside.inttoptr(function.args[0], kind.as_pointer())
        passed = cgutils.unpack_tuple(inside, inside.load(cgutils.gep_inbounds(inside, own, 0, 1)))
        passed = [inside.bitcast(own, LONG.as_pointer()), *passed]
        context.call_internal_no_propagate(inside, compiled.fndesc, signature, passed)
        inside.ret_void()
        return context.make_tuple(builder, result, [builder.ptrtoint(function, LONG), queue])

    result = types.Tuple((types.int64, memory))
    return result(body, args), codegen


@intrinsic
def call(typingctx, function, argument):
    """Call what :func:`closure` made."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [LONG])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def number_of(typingctx, memory):
    """An address as a number."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], LONG)

    return types.int64(memory), codegen


@intrinsic
def change(typingctx, memory, index, by):
    """``memory[index] += by`` as one step that no other thread can come between; the number it was before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), args[2], "seq_cst")

    return types.int64(memory, types.intp, types.int64), codegen


@intrinsic
def swap(typingctx, memory, index, value):
    """``memory[index] = value`` in the same way; the number it was before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("xchg", builder.gep(args[0], [args[1]]), args[2], "seq_cst")

    return types.int64(memory, types.intp, types.int64), codegen


@intrinsic
def look(typingctx, memory, index):
    """``memory[index]``; whoever changed it to this has done all that it did before."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "acquire", align=8)

    return types.int64(memory, types.intp), codegen


@intrinsic
def pause(typingctx):
    """Let the other thread of this core, and the power budget, have a moment."""

    def codegen(context, builder, signature, args):
        if _X86:
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen
