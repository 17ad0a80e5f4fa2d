"""Barriers: mbarrier objects in shared memory, named barriers of a block, barriers of a cluster, and between grids.

An mbarrier counts arrivals and bytes; when both are complete its phase flips. A wait names the parity of the phase it
waits for. Source: PTX ISA, "Parallel Synchronization and Communication Instructions".
"""

from __future__ import annotations

from .instruction import Instruction, check

__all__ = [
    "arrive",
    "arrive_remote",
    "block_barrier",
    "cluster_arrive",
    "cluster_arrive_relaxed",
    "cluster_wait",
    "expect_bytes",
    "grid_launch",
    "grid_wait",
    "init",
    "named_barrier",
    "wait",
    "warp_barrier",
]

SECTION = "mbarrier"

# Inputs: address, arrivals of one phase.
init = Instruction("mbarrier.init.shared::cta.b64 [$0], $1;", inputs=("u32", "u32"), section=SECTION)
arrive = Instruction("mbarrier.arrive.shared::cta.b64 _, [$0];", inputs=("u32",), section=SECTION, arch=90)
# Arrives and adds bytes that this phase waits for.
expect_bytes = Instruction(
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", inputs=("u32", "u32"), section=SECTION, arch=90
)
# Arrives at the same address in another CTA of the cluster. Inputs: address, CTA rank. Without `.release.cluster`,
# which doubled the run time of a kernel on an H200; only reads of the slot precede it.
arrive_remote = Instruction(
    "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, $0, $1; mbarrier.arrive.shared::cluster.b64 _, [remote]; }",
    inputs=("u32", "u32"),
    section=SECTION,
    arch=90,
)
# Inputs: address, parity. The hardware suspends the thread for a while in each try.
wait = Instruction(
    "{ .reg .pred done; AGAIN_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; "
    "@done bra DONE_${:uid}; bra AGAIN_${:uid}; DONE_${:uid}: }",
    inputs=("u32", "u32"),
    section=SECTION,
    arch=90,
)

block_barrier = Instruction("bar.sync 0;", section="bar")


def named_barrier(threads: int) -> Instruction:
    """Barrier number ``$0`` (1..15; 0 is the whole block's) among ``threads`` threads.

    >>> named_barrier(128).text
    'bar.sync $0, 128;'
    """
    check(threads % 32 == 0 and 0 < threads <= 1024, f"bar.sync: expected whole warps of threads, got {threads}")
    return Instruction(f"bar.sync $0, {threads};", inputs=("u32",), section="bar")


# What the lanes of a warp did before is done for all of them after.
warp_barrier = Instruction("bar.warp.sync 0xffffffff;", section="bar.warp.sync")
cluster_arrive = Instruction("barrier.cluster.arrive.aligned;", section="barrier.cluster", arch=90)
# Hands over nothing that was written, but what came before is done: enough ahead of overwriting what others have read.
# `cluster_arrive` is a fence of the whole GPU's memory.
cluster_arrive_relaxed = Instruction("barrier.cluster.arrive.relaxed.aligned;", section="barrier.cluster", arch=90)
cluster_wait = Instruction("barrier.cluster.wait.aligned;", section="barrier.cluster", arch=90)
# Between launches with programmatic stream serialization. The grids before this one are complete and what they wrote
# is visible; without such a launch, nothing.
grid_wait = Instruction("griddepcontrol.wait;", section="griddepcontrol", arch=90)
# The grid after this one may begin when all CTAs have issued this or have ended; the first of a CTA's threads counts.
grid_launch = Instruction("griddepcontrol.launch_dependents;", section="griddepcontrol", arch=90)
