"""Which kernel for which product: frozen configs, what makes one valid, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .layout import BLOCK, BLOCK_BYTES

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SHIPPED", "SHIPPED_GEMV", "SHIPPED_SAMOYEDS", "GemmConfig", "GemvConfig", "PairRows"]

SHARED_MEMORY = 232448 - 1024  # bytes a block may ask for on sm_90; the ring starts at a multiple of 1024


class PairRows:
    """Rows of a kernel whose packed row may belong to a pair of output rows, as in Samoyeds."""

    pairs: bool

    @property
    def height(self) -> int:
        """Output rows of a packed block."""
        return BLOCK * 2 if self.pairs else BLOCK


@dataclass(frozen=True)
class GemmConfig(PairRows):
    """Shape of the ``wgmma.sp`` kernel: a tile of ``64·warpgroups·blocks`` packed rows by ``tile_t`` tokens, ``tile_k``
    of k a step. A packed row of Samoyeds (``pairs``) is the sub-row of a pair of output rows.
    """

    warpgroups: int = 2  # consumers
    blocks: int = 1  # of 64 rows, for each consumer
    tile_t: int = 256
    tile_k: int = 64
    stages: int = 5
    dtype: str = "f16"
    bias: bool = False
    group: int = 8  # row tiles that go through the tokens together
    weights_hint: str | None = None  # L2 policy of the weights
    pairs: bool = False  # Samoyeds 1:2

    @property
    def name(self) -> str:
        """Kernel and tile."""
        return f"gemm{' samoyeds' * self.pairs} {self.tile_m}x{self.tile_t}x{self.tile_k}"

    @property
    def signature(self) -> str:
        """Letters of the arguments: weights, picks of Samoyeds, map of X, Y, bias, partial sums, flags; rows, tokens,
        pitch of Y, blocks along K, split tiles, their parts; of Samoyeds the steps of a run and the number of runs.
        """
        return "ppmppppiiiiiiii" if self.pairs else "pmppppiiiiii"

    @property
    def tile_m(self) -> int:
        """Output rows of a tile."""
        return self.height * self.warpgroups * self.blocks

    @property
    def width(self) -> int:
        """Bytes that rows of tokens lie at multiples of: what the copy engine asks for."""
        return 16

    @property
    def run_sums(self) -> int:
        """Accumulators of a thread that ``wgmma`` adds to."""
        return self.blocks * self.tile_t // 2

    @property
    def sums(self) -> int:
        """All accumulators of a thread: Samoyeds also has those of the even output rows."""
        return self.run_sums * (2 if self.pairs else 1)

    @property
    def fillers(self) -> int:
        """Arrivals that fill a slot, besides its bytes."""
        return 1

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def partial_slots(self) -> tuple[int, int]:
        """Partial sums that a CTA may leave: how many sets, each with a flag, and the floats of one."""
        return self.warpgroups, self.sums * 128

    @property
    def token_bytes(self) -> int:
        """Tokens of one slot, 2 bytes each."""
        return self.tile_t * self.tile_k * 2

    @property
    def weight_bytes(self) -> int:
        """Packed weights of one slot for 64 rows."""
        return self.tile_k // BLOCK * BLOCK_BYTES

    @property
    def slot_bytes(self) -> int:
        """A slot; a multiple of 1024, which the 128-byte swizzle of the tokens asks for."""
        return -(-(self.token_bytes + self.warpgroups * self.blocks * self.weight_bytes) // 1024) * 1024

    @property
    def chunk(self) -> int:
        """Tokens that the epilogue stages or leaves out together."""
        staged = self.staged_tokens if self.pairs else 0
        return next(size for size in (32, 16, 8) if self.tile_t % size == staged % size == 0)

    @property
    def buffers(self) -> int:
        """Buffers of a warpgroup for outputs of 2:4: of two, one is written while the other is read."""
        return 1 if self.pairs or self.tile_t < 128 else 2

    @property
    def staged_token_bytes(self) -> int:
        """A token's outputs of a warpgroup when staged, and 16 bytes that spread tokens over the banks."""
        return self.height * self.blocks * 2 + 16

    @property
    def staged_tokens(self) -> int:
        """Tokens that the epilogue stages in a buffer before it writes them. Of Samoyeds all, or those for which three
        slots of 128 columns leave room; else a slot is worth more.
        """
        if not self.pairs:
            return self.chunk
        barriers = 128  # of seven slots, and of sums
        room = SHARED_MEMORY - barriers - 3 * self.slot_bytes * (2 * BLOCK // self.tile_k)
        return min(self.tile_t, room // (self.warpgroups * self.staged_token_bytes) // 16 * 16)

    @property
    def staging_bytes(self) -> int:
        """What one warpgroup needs for the epilogue."""
        return self.buffers * self.staged_tokens * self.staged_token_bytes

    @property
    def staging_offset(self) -> int:
        """Where the epilogue's buffers begin: after the ring."""
        return self.stages * self.slot_bytes

    @property
    def barrier_offset(self) -> int:
        """Where the barriers begin, 8 bytes each: the full ones, then the empty ones."""
        return self.staging_offset + self.warpgroups * self.staging_bytes

    @property
    def sums_barrier(self) -> int:
        """Where the barrier is that counts the sums from a cluster."""
        return self.barrier_offset + 16 * self.stages

    @property
    def shared_bytes(self) -> int:
        """Ring, epilogue and barriers."""
        return self.sums_barrier + 8

    @property
    def clusters(self) -> tuple[int, ...]:
        """How many CTAs may form a cluster that shares a tile along k: the ring has room for what the others send to
        one of them, the sums of its warps. Tiles of 96 tokens lose 15 % (benchmarks/LOG.md).
        """
        if self.blocks > 1 or self.warpgroups > 2 or self.tile_t not in (8, 16, 32, 64, 128):
            return ()
        warps, sums = 4 * self.warpgroups, 32 * 4 * self.sums
        return tuple(c for c in range(2, 9) if -(-warps // c) * (c - 1) * sums <= self.staging_offset)

    @property
    def producer_registers(self) -> int:
        """What the producer keeps of its share at launch: the more copies a step has, the more addresses."""
        if self.warpgroups == 3:
            return 32
        two = 40 if self.sums >= 128 else 72 if self.tile_k == BLOCK else 88
        return 88 if self.warpgroups == 1 else two

    @property
    def consumer_registers(self) -> int:
        """At launch every thread has its share of 65536, in eights; ``setmaxnreg`` moves some to the consumers."""
        return {1: 240, 2: 252 - self.producer_registers // 2, 3: 160}[self.warpgroups]

    def deepest(self, most: int = 12) -> Self:
        """This config with as many slots as fit, up to ``most``."""
        room = SHARED_MEMORY - self.warpgroups * self.staging_bytes
        return replace(self, stages=min(most, (room - 8) // (self.slot_bytes + 16)))

    def problems(self) -> list[str]:
        """Why the config cannot run; empty if it can."""
        found = []
        if self.dtype not in ("f16", "bf16"):
            found.append(f"dtype={self.dtype}: the operands are f16 or bf16")
        if self.group < 1:
            found.append(f"group={self.group}: at least one row tile at a time")
        if self.warpgroups not in (1, 2, 3):
            return [*found, f"warpgroups={self.warpgroups}: one to three consumers; more leave each too few registers"]
        if self.blocks not in (1, 2):
            found.append(f"blocks={self.blocks}: a consumer has registers for 64 or 128 rows")
        if self.pairs and self.blocks != 1:
            found.append(f"pairs, blocks={self.blocks}: a consumer of Samoyeds has 64 sub-rows")
        if self.tile_t != 8 and (self.tile_t % 16 or not 16 <= self.tile_t <= 256):
            found.append(f"tile_t={self.tile_t}: wgmma takes up to 256 columns, the epilogue 8 or multiples of 16")
        if self.tile_k not in (64, 128):
            found.append(f"tile_k={self.tile_k}: a step is one or two blocks of 64")
        if self.stages < 2:
            found.append(f"stages={self.stages}: one slot fills while another is read")
        if self.shared_bytes > SHARED_MEMORY:
            found.append(f"shared memory: {self.shared_bytes} bytes, a block has {SHARED_MEMORY}")
        room = 32 if self.pairs else 56 if self.blocks == 1 else 80
        if self.sums + room > self.consumer_registers:
            found.append(f"registers: {self.sums} sums a thread leave no room in {self.consumer_registers}")
        if self.producer_registers + self.warpgroups * self.consumer_registers > 512:
            found.append(
                f"registers: {self.warpgroups} consumers with {self.consumer_registers} leave the producer none"
            )
        launch = 65536 // self.threads // 8 * 8
        if self.tile_t // 2 + 27 > launch:
            found.append(f"registers: ptxas needs {self.tile_t // 2 + 27} for an instruction, a launch has {launch}")
        return found


@dataclass(frozen=True)
class GemvConfig:
    """Shape of the kernel for few tokens: 16 packed rows by ``tile_t`` tokens for ``warps`` that share k.

    A packed row of Samoyeds (``pairs``) is the sub-row of a pair of output rows.
    """

    tile_t: int = 8
    warps: int = 8
    batch: int = 4  # blocks of k that a warp has under way
    dtype: str = "f16"
    bias: bool = False
    pairs: bool = False  # Samoyeds 1:2
    width: int = 16  # bytes of a copy of tokens: 16, or 4 where they lie at multiples of 4 only

    @property
    def signature(self) -> str:
        """Letters of the arguments: weights, picks of Samoyeds, X, Y, bias; rows, tokens, columns, pitches of X and Y,
        blocks along K; of Samoyeds the blocks of a run and the number of runs.
        """
        return "pppppiiiiiiii"

    @property
    def name(self) -> str:
        """Kernel and tile."""
        by = ", by 4 bytes" * (self.width == 4)
        return f"gemv{' samoyeds' * self.pairs} {self.outputs}x{self.tile_t}, {self.warps} warps x {self.batch}{by}"

    @property
    def sets(self) -> int:
        """Output rows of a packed row, each with its sums."""
        return 2 if self.pairs else 1

    @property
    def outputs(self) -> int:
        """Outputs of a CTA for a token."""
        return 16 * self.sets

    @property
    def tile_m(self) -> int:
        """Output rows of a tile."""
        return self.outputs

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def copies(self) -> int:
        """Copies of a warp for eight tokens of a block."""
        return 32 // self.width

    @property
    def area(self) -> int:
        """Shared memory of a warp: tokens of the blocks under way, in whose place its sums come at the end."""
        tokens, sums = self.batch * self.tile_t * BLOCK * 2, self.sets * self.tile_t * 16 * 4
        return max(tokens, sums)

    @property
    def shared_bytes(self) -> int:
        """Of all warps."""
        return self.warps * self.area

    @property
    def ctas(self) -> int:
        """CTAs that share an SM: registers hold 32 warps with one block of eight tokens under way, 24 with two, 16 with
        four or eight.
        """
        warps = {1: 32, 2: 24, 4: 16, 8: 16}.get(self.batch * self.tile_t // 8, 8)
        return max(1, warps // self.warps)

    def problems(self) -> list[str]:
        """Why the config cannot run; empty if it can."""
        found = []
        if self.tile_t not in (8, 16):
            found.append(f"tile_t={self.tile_t}: 8 or 16 tokens")
        if not 1 <= self.warps <= 16:
            found.append(f"warps={self.warps}: 1 to 16")
        if self.batch not in (1, 2, 4):
            found.append(f"batch={self.batch}: 1, 2 or 4 blocks fit in the registers")
        if self.width not in (4, 16):
            found.append(f"width={self.width}: cp.async copies 16 bytes, or 4 where rows lie at multiples of 4")
        if self.width == 4 and self.tile_t > 8:
            found.append(f"width=4, tile_t={self.tile_t}: copies of 4 bytes take the registers of more than 8 tokens")
        if self.shared_bytes > SHARED_MEMORY:
            found.append(f"shared memory: {self.shared_bytes} bytes, a block has {SHARED_MEMORY}")
        return found


# The shapes that `choose` picks from. Large tiles for many tokens: sums fill the registers, a step of 64 leaves room
# for five slots. Small tiles stream the weights once, which do not stay in the L2 cache; about 100 KB of an SM under
# way reach the memory's bandwidth, and twice as much lose a few percent of it.
SHIPPED = (
    GemmConfig(group=16),
    GemmConfig(tile_t=192, stages=6),
    GemmConfig(tile_t=128, tile_k=128, stages=4),
    GemmConfig(tile_t=96, tile_k=128, stages=5),
    *(
        GemmConfig(warpgroups=warpgroups, tile_t=tile_t, tile_k=128, stages=stages, weights_hint="evict_first")
        for warpgroups, tile_t, stages in (
            (2, 64, 6),
            (2, 32, 8),
            (2, 16, 7),
            (2, 8, 6),
            (1, 64, 8),
            (1, 32, 8),
            (1, 16, 9),
            (1, 8, 8),
        )
    ),
)

# Samoyeds: half of the sums are those of the even rows, so 192 tokens at most, or 128 for three consumers. Steps of
# 128 columns where runs are as long: each ends with a wait. One consumer where two would leave SMs without a tile.
SHIPPED_SAMOYEDS = tuple(
    GemmConfig(
        pairs=True,
        warpgroups=warpgroups,
        tile_t=tile_t,
        tile_k=tile_k,
        group=8 if tile_t > 64 else 16,
        weights_hint="evict_first" if tile_t <= 64 else None,
    ).deepest(stages * 128 // tile_k)
    for tile_k in (128, 64)
    for warpgroups, tile_t, stages in (
        (3, 128, 12),
        (2, 192, 12),
        (2, 176, 12),
        (2, 128, 12),
        (2, 96, 12),
        (2, 64, 4),
        (2, 32, 4),
        (2, 16, 5),
        (2, 8, 4),
        (1, 64, 6),
        (1, 32, 8),
        (1, 16, 7),
        (1, 8, 8),
    )
    if (tile_t, tile_k) != (176, 64)  # it would spill a register
)

# For few tokens, or few rows. Two CTAs share an SM, so that some warps multiply while others wait; sixteen warps suit a
# CTA that has an SM for itself, two blocks under way matrices with so many rows that three CTAs share an SM.
SHIPPED_GEMV = (
    GemvConfig(batch=4),
    GemvConfig(batch=2),
    GemvConfig(tile_t=16, batch=4),
)
SHIPPED_GEMV_SAMOYEDS = (
    GemvConfig(batch=4, pairs=True),
    GemvConfig(warps=16, batch=2, pairs=True),
    GemvConfig(tile_t=16, batch=4, pairs=True),
)
