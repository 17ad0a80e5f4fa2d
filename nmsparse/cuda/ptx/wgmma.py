"""Warpgroup matrix multiply-accumulate: 128 threads, operands in shared memory, results in registers.

``D[m, n] += Σ_k A[m, k] · B[n, k]`` for ``m < 64``; ``k < 16`` dense, ``k < 32`` with a 2:4 sparse A.
Each thread holds N/2 accumulators (:func:`nmsparse.formats.fragments.wgmma_sp_d`).
Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
"""

from __future__ import annotations

from .instruction import Instruction, check, one_of

__all__ = ["DTYPES", "commit", "fence", "wait", "wgmma", "wgmma_sp"]

DTYPES = ("f16", "bf16")
SECTION = "wgmma.mma_async"


def wgmma_sp(n: int, dtype: str, *, a_registers: bool = False) -> Instruction:
    """``m64nNk32``, A 2:4. Inputs: A (a descriptor, or 4 registers), the descriptor of B, metadata, and whether D is
    kept (0 overwrites it).

    The metadata are read when the product runs, as the ISA says of A in registers: not to be overwritten before a wait.

    >>> wgmma_sp(8, "f16").text.split()[0]
    '{'
    """
    return _wgmma(n, dtype, sparse=True, a_registers=a_registers)


def wgmma(n: int, dtype: str, *, a_registers: bool = False) -> Instruction:
    """``m64nNk16``, A dense. Inputs as for :func:`wgmma_sp`, without metadata.

    >>> wgmma(256, "bf16").inputs
    ('u64', 'u64', 'u32')
    """
    return _wgmma(n, dtype, sparse=False, a_registers=a_registers)


def _wgmma(n: int, dtype: str, sparse: bool, a_registers: bool) -> Instruction:
    check(n % 8 == 0 and 8 <= n <= 256, f"wgmma: expected N as a multiple of 8 in 8..256, got {n}")
    one_of(dtype, DTYPES, "wgmma dtype")
    first = n // 2
    tied = 2 * first  # LLVM numbers the tied inputs too
    accumulators = ", ".join(f"${i}" for i in range(first))
    a = "{" + ", ".join(f"${tied + i}" for i in range(4)) + "}" if a_registers else f"${tied}"
    b = tied + (4 if a_registers else 1)
    meta = f"${b + 1}, 0, " if sparse else ""
    keep = b + (2 if sparse else 1)
    transposes = "0" if a_registers else "0, 0"
    name = f"wgmma.mma_async.{'sp.' if sparse else ''}sync.aligned.m64n{n}k{32 if sparse else 16}.f32.{dtype}.{dtype}"
    return Instruction(
        f"{{ .reg .pred keep; setp.ne.b32 keep, ${keep}, 0; "
        f"{name} {{{accumulators}}}, {a}, ${b}, {meta}keep, 1, 1, {transposes}; }}",
        in_place=("f32",) * first,
        inputs=(("u32",) * 4 if a_registers else ("u64",)) + ("u64",) + (("u32",) if sparse else ()) + ("u32",),
        section=SECTION,
        arch=90,
    )


# The first wgmma that touches registers or shared memory written by others comes after this.
fence = Instruction("wgmma.fence.sync.aligned;", section="wgmma.fence", arch=90)
# Makes one group of all wgmma issued so far.
commit = Instruction("wgmma.commit_group.sync.aligned;", section="wgmma.commit_group", arch=90)


def wait(groups: int) -> Instruction:
    """Blocks until at most ``groups`` of the newest groups are still running.

    >>> wait(1).text
    'wgmma.wait_group.sync.aligned 1;'
    """
    check(0 <= groups <= 7, f"wgmma.wait_group: expected 0..7 groups, got {groups}")
    return Instruction(f"wgmma.wait_group.sync.aligned {groups};", section="wgmma.wait_group", arch=90)
