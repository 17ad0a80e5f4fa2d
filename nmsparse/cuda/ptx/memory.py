"""Loads, stores, fences, conversions, and the registers that say where a thread is.

Source: PTX ISA, "Memory Consistency Model", "Data Movement and Conversion Instructions", "Special Registers".
"""

from __future__ import annotations

from .instruction import Instruction, check, one_of

__all__ = [
    "add_global_s32",
    "add_shared_s32",
    "cluster_rank",
    "cvta_shared",
    "divide",
    "divide_f32",
    "fence_gpu",
    "fence_mbarrier_init",
    "fence_proxy_async",
    "load",
    "load_acquire",
    "load_if",
    "load_where",
    "map_shared",
    "pack",
    "read_again",
    "redux_add",
    "set_max_registers",
    "store",
    "store_async",
    "store_release",
    "unpack",
    "vote_ballot",
]

ADDRESS = {"shared": "u32", "global": "u64"}
LOAD_HINTS = {"global": ("", "nc", "cs", "cg", "L1::no_allocate"), "shared": ("",)}
STORE_HINTS = {"global": ("", "cs", "cg"), "shared": ("",)}


def _vector(count: int, first: int) -> str:
    registers = ", ".join(f"${first + i}" for i in range(count))
    return f"{{{registers}}}" if count > 1 else registers


def load(space: str, kind: str, count: int = 1, *, hint: str = "") -> Instruction:
    """``count`` values of type ``kind`` from ``space`` ("shared" or "global"); ``hint`` as PTX spells it.

    >>> load("global", "u32", 4, hint="nc").text
    'ld.global.nc.v4.u32 {$0, $1, $2, $3}, [$4];'
    """
    one_of(space, ADDRESS, "state space")
    one_of(count, (1, 2, 4), "vector length")
    one_of(hint, LOAD_HINTS[space], "load hint")
    vector = f".v{count}" if count > 1 else ""
    return Instruction(
        f"ld.{space}{'.' * bool(hint)}{hint}{vector}.{kind} {_vector(count, 0)}, [${count}];",
        results=(kind,) * count,
        inputs=(ADDRESS[space],),
        section="ld",
    )


def store(space: str, kind: str, count: int = 1, *, hint: str = "") -> Instruction:
    """``count`` values to ``space``. Inputs: the address, the values.

    >>> store("global", "f32", 2).text
    'st.global.v2.f32 [$0], {$1, $2};'
    """
    one_of(space, ADDRESS, "state space")
    one_of(count, (1, 2, 4), "vector length")
    one_of(hint, STORE_HINTS[space], "store hint")
    vector = f".v{count}" if count > 1 else ""
    return Instruction(
        f"st.{space}{'.' * bool(hint)}{hint}{vector}.{kind} [$0], {_vector(count, 1)};",
        inputs=(ADDRESS[space],) + (kind,) * count,
        section="st",
    )


# 16 bytes into the shared memory of a CTA of the cluster, where they also count as bytes of an mbarrier's phase: who
# waits for that sees them. Inputs: address, values, address of the mbarrier.
store_async = Instruction(
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [$0], {$1, $2, $3, $4}, [$5];",
    inputs=("u32", "f32", "f32", "f32", "f32", "u32"),
    section="st.async",
    arch=90,
)

# One 16-bit number, or 0 where it must not be read. Inputs: the address, 0 or not.
load_if = Instruction(
    "{ .reg .pred take; setp.ne.u32 take, $2, 0; mov.u16 $0, 0; @take ld.global.u16 $0, [$1]; }",
    results=("u16",),
    inputs=("u64", "u32"),
    section="ld",
)


def load_where(kind: str, count: int = 1) -> Instruction:
    """``count`` values from global memory, or zeros where they must not be read.

    Inputs: the address, 0 or not. A select after a load would wait for it before the next load could begin.

    >>> load_where("f32").inputs
    ('u64', 'u32')
    """
    one_of(count, (1, 2, 4), "vector length")
    vector = f".v{count}" if count > 1 else ""
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))
    return Instruction(
        f"{{ .reg .pred take; setp.ne.u32 take, ${count + 1}, 0; {zeros} "
        f"@take ld.global{vector}.{kind} {_vector(count, 0)}, [${count}]; }}",
        results=(kind,) * count,
        inputs=("u64", "u32"),
        section="ld",
    )


# A flag between blocks: what was written before the release is seen after the acquire.
load_acquire = Instruction("ld.acquire.gpu.global.u32 $0, [$1];", results=("u32",), inputs=("u64",), section="ld")
store_release = Instruction("st.release.gpu.global.u32 [$0], $1;", inputs=("u64", "u32"), section="st")
fence_gpu = Instruction("fence.acq_rel.gpu;", section="membar")
add_global_s32 = Instruction(
    "atom.global.add.s32 $0, [$1], $2;", results=("s32",), inputs=("u64", "s32"), section="atom"
)
add_shared_s32 = Instruction(
    "atom.shared.add.s32 $0, [$1], $2;", results=("s32",), inputs=("u32", "s32"), section="atom"
)

# Initialised mbarriers become visible to the copy engine and to the other CTAs of the cluster.
fence_mbarrier_init = Instruction("fence.mbarrier_init.release.cluster;", section="membar", arch=90)
# Ordinary writes to shared memory become visible to wgmma and the copy engine.
fence_proxy_async = Instruction("fence.proxy.async.shared::cta;", section="membar", arch=90)

cvta_shared = Instruction(
    "{ .reg .u64 window; cvta.to.shared.u64 window, $1; cvt.u32.u64 $0, window; }",
    results=("u32",),
    inputs=("u64",),
    memory=False,
    section="cvta",
)
divide = Instruction("div.u32 $0, $1, $2;", results=("u32",), inputs=("u32", "u32"), memory=False, section="div")
# To 2 ulp; the exactly rounded division is a call.
divide_f32 = Instruction(
    "div.full.f32 $0, $1, $2;", results=("f32",), inputs=("f32", "f32"), memory=False, section="div"
)
# Where an address of this CTA's shared memory is in another CTA of the cluster. Inputs: address, rank of that CTA.
map_shared = Instruction(
    "mapa.shared::cluster.u32 $0, $1, $2;",
    results=("u32",),
    inputs=("u32", "u32"),
    memory=False,
    section="mapa",
    arch=90,
)
cluster_rank = Instruction(
    "mov.u32 $0, %cluster_ctarank;", results=("u32",), memory=False, section="%cluster_ctarank", arch=90
)

vote_ballot = Instruction(
    "{ .reg .pred vote; setp.ne.u32 vote, $1, 0; vote.sync.ballot.b32 $0, vote, 0xffffffff; }",
    results=("u32",),
    inputs=("u32",),
    section="vote.sync",
)
redux_add = Instruction(
    "redux.sync.add.s32 $0, $1, 0xffffffff;", results=("s32",), inputs=("s32",), section="redux.sync"
)


def pack(dtype: str) -> Instruction:
    """Two fp32 rounded to nearest into one register. Inputs: the low half, the high half.

    >>> pack("bf16").text
    'cvt.rn.bf16x2.f32 $0, $2, $1;'
    """
    one_of(dtype, ("f16", "bf16"), "dtype")
    return Instruction(
        f"cvt.rn.{dtype}x2.f32 $0, $2, $1;", results=("u32",), inputs=("f32", "f32"), memory=False, section="cvt"
    )


def unpack(dtype: str) -> Instruction:
    """One 16-bit number, in the low half of a register, as fp32.

    >>> unpack("f16").results
    ('f32',)
    """
    one_of(dtype, ("f16", "bf16"), "dtype")
    return Instruction(
        f"{{ .reg .b16 low; cvt.u16.u32 low, $1; cvt.f32.{dtype} $0, low; }}"
        if dtype == "f16"
        else "{ .reg .b32 high; shl.b32 high, $1, 16; mov.b32 $0, high; }",
        results=("f32",),
        inputs=("u32",),
        memory=False,
        section="cvt",
    )


def read_again(register: str) -> Instruction:
    """A special register, read each time anew: what is computed from it does not stay in registers in between.

    >>> read_again("tid.x").text
    'mov.u32 $0, %tid.x;'
    """
    one_of(register, ("tid.x", "ctaid.x"), "special register")
    return Instruction(f"mov.u32 $0, %{register};", results=("u32",), section="Special Registers")


def set_max_registers(count: int, *, grow: bool) -> Instruction:
    """Registers of each thread of the calling warpgroup from here on; needs a launch bound of one block.

    >>> set_max_registers(40, grow=False).text
    'setmaxnreg.dec.sync.aligned.u32 40;'
    """
    check(count % 8 == 0 and 24 <= count <= 256, f"setmaxnreg: expected a multiple of 8 in 24..256, got {count}")
    return Instruction(
        f"setmaxnreg.{'inc' if grow else 'dec'}.sync.aligned.u32 {count};", section="setmaxnreg", arch=90
    )
