"""Asynchronous copies from global to shared memory: by threads (``cp.async``) and by the copy engine (``.bulk``).

Source: PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy" and "Tensor copy".
"""

from __future__ import annotations

from .instruction import Instruction, check, one_of

__all__ = [
    "arrive_when_done",
    "bulk_load",
    "commit",
    "copy_row",
    "cp_async",
    "tensor_load",
    "tensor_prefetch",
    "tensor_store",
    "wait",
]

HINTS = (None, "evict_first", "evict_last")
# createpolicy results with fraction 1, as the hardware encodes them; the same constants that CUDA's libraries print.
POLICIES = {"evict_first": 0x12F0000000000000, "evict_last": 0x14F0000000000000}


def cp_async(size: int) -> Instruction:
    """``size`` (4, 8, 16) bytes by one thread. Inputs: shared address, global address, bytes to read; the rest is 0.

    >>> cp_async(16).text
    'cp.async.cg.shared.global [$0], [$1], 16, $2;'
    """
    one_of(size, (4, 8, 16), "cp.async size")
    level = "cg" if size == 16 else "ca"  # only whole 16-byte copies may pass by L1
    return Instruction(
        f"cp.async.{level}.shared.global [$0], [$1], {size}, $2;", inputs=("u32", "u64", "u32"), section="cp.async"
    )


# 16 bytes of one of many rows, by one thread; nothing of row 0xFFFFFFFF, which does not exist. Inputs: shared address,
# global address of row 0, the distance of the row in units of 16 bytes, bytes to read (the rest is 0). The address is
# made here, in one step, so that compilers do not keep one for each row in two registers.
copy_row = Instruction(
    "{ .reg .pred there; .reg .u64 from; setp.ne.u32 there, $2, 0xFFFFFFFF; mad.wide.u32 from, $2, 16, $1; "
    "@there cp.async.cg.shared.global [$0], [from], 16, $3; }",
    inputs=("u32", "u64", "u32", "u32"),
    section="cp.async",
)
commit = Instruction("cp.async.commit_group;", section="cp.async.commit_group")


# Arrives at an mbarrier, as one of the arrivals it was initialised with, when this thread's copies so far have landed.
arrive_when_done = Instruction(
    "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", inputs=("u32",), section="cp.async.mbarrier.arrive"
)


def wait(groups: int) -> Instruction:
    """Blocks until at most ``groups`` of this thread's newest groups are still under way.

    >>> wait(0).text
    'cp.async.wait_group 0;'
    """
    check(groups >= 0, f"cp.async.wait_group: expected 0 or more groups, got {groups}")
    return Instruction(f"cp.async.wait_group {groups};", section="cp.async.wait_group")


def _hint(hint: str | None) -> tuple[str, str]:
    """Suffix and operand of a cache hint that is a constant."""
    one_of(hint, HINTS, "cache hint")
    if hint is None:
        return "", ""
    return ".L2::cache_hint", f", 0x{POLICIES[hint]:X}"


def bulk_load(hint: str | None = None) -> Instruction:
    """Contiguous bytes, 16-byte aligned, counted by an mbarrier. Inputs: shared, global, bytes, mbarrier.

    >>> bulk_load().inputs
    ('u32', 'u64', 'u32', 'u32')
    """
    suffix, operand = _hint(hint)
    return Instruction(
        f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{suffix} [$0], [$1], $2, [$3]{operand};",
        inputs=("u32", "u64", "u32", "u32"),
        section="cp.async.bulk",
        arch=90,
    )


def tensor_load(*, axes: int = 2, multicast: bool = False, hint: str | None = None) -> Instruction:
    """A box through a tensor map; what lies outside the tensor arrives as zeros, and counts.

    Inputs: shared address, tensor map, coordinates (fastest first), mbarrier, and with ``multicast`` the bit mask of
    the cluster's CTAs that receive the box and its bytes, each at the same shared offset.

    >>> tensor_load(multicast=True).inputs
    ('u32', 'u64', 's32', 's32', 'u32', 'u16')
    """
    check(1 <= axes <= 5, f"cp.async.bulk.tensor: expected 1 to 5 axes, got {axes}")
    suffix, operand = _hint(hint)
    cast = ".multicast::cluster" if multicast else ""
    coordinates = ", ".join(f"${2 + axis}" for axis in range(axes))
    return Instruction(
        f"cp.async.bulk.tensor.{axes}d.shared::cluster.global.mbarrier::complete_tx::bytes{cast}{suffix} "
        f"[$0], [$1, {{{coordinates}}}], [${2 + axes}]{f', ${3 + axes}' if multicast else ''}{operand};",
        inputs=("u32", "u64", *("s32",) * axes, "u32") + (("u16",) if multicast else ()),
        section="cp.async.bulk.tensor",
        arch=90,
    )


# A 2-D box from shared memory; what lies outside the tensor is not written. Inputs: map, coordinates, shared address.
tensor_store = Instruction(
    "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [$0, {$1, $2}], [$3];",
    inputs=("u64", "s32", "s32", "u32"),
    section="cp.async.bulk.tensor",
    arch=90,
)
tensor_prefetch = Instruction("prefetch.tensormap [$0];", inputs=("u64",), section="prefetch", arch=90)
