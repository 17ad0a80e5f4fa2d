"""The shapes of the ``mma.sp`` kernel: what one CTA computes, what its shared memory holds and where.

A ring of slots, each with one step of k: first the tokens, in slabs of 64 columns with the 16-byte chunks of a token
spread over the banks, then the packed weights, 64 rows after another. After the last step the ring is the staging
buffer of the epilogue. The places are plain integer functions, which the GPU and the CPU twin both use.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import PairRows
from .layout import BLOCK, BLOCK_BYTES, VALUE_BYTES

__all__ = [
    "SHARED_MEMORY",
    "SHIPPED",
    "SHIPPED_SAMOYEDS",
    "MmaConfig",
    "metadata_place",
    "metadata_word",
    "token_place",
    "value_row",
    "weights_place",
]

# Bytes a block may ask for. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_MEMORY = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90a": 232448, "sm_120": 101376}


@dataclass(frozen=True)
class MmaConfig(PairRows):
    """A tile of ``tile_m`` rows by ``tile_t`` tokens for ``warps_m · warps_t`` warps, ``tile_k`` of k a step.

    A packed row of Samoyeds (``pairs``) is the sub-row of a pair of output rows; ``tile_k`` divides its runs.
    """

    tile_m: int = 128
    tile_t: int = 128
    tile_k: int = 64
    warps_m: int = 2
    warps_t: int = 4
    stages: int = 3
    dtype: str = "f16"
    bias: bool = False
    vector: bool = True  # the address and the pitch of the tokens are multiples of 16 bytes
    gather: tuple[int, int] | None = None  # (v, m): each v rows of W keep 4 of every m columns
    group: int = 8  # row tiles that go through the tokens together
    pairs: bool = False  # Samoyeds 1:2

    @property
    def width(self) -> int:
        """Bytes that rows of tokens lie at multiples of."""
        return 16 if self.vector else 2

    @property
    def signature(self) -> str:
        """Letters of the arguments: weights, tokens, indices of V:N:M or Samoyeds, output, bias, partial sums, flags;
        rows, tokens, columns, blocks along k, pitches of tokens and output in elements, split tiles and their parts; of
        Samoyeds the steps of a run and the number of runs.
        """
        return "pppppppiiiiiiiiii"

    @property
    def name(self) -> str:
        """Kernel and tile."""
        return f"mma{' samoyeds' * self.pairs} {self.tile_m}x{self.tile_t}x{self.tile_k}"

    @property
    def tile_rows(self) -> int:
        """Packed rows of a tile."""
        return self.tile_m * BLOCK // self.height

    @property
    def partial_slots(self) -> tuple[int, int]:
        """Partial sums that a CTA may leave: how many sets, each with a flag, and the floats of one."""
        first, last = self.kept
        return 1, (last - first) * self.threads

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_t

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def atoms(self) -> tuple[int, int]:
        """Instructions that cover the tile of a warp: of 16 rows, of 8 tokens."""
        return self.tile_rows // (16 * self.warps_m), self.tile_t // (8 * self.warps_t)

    @property
    def run_sums(self) -> int:
        """Accumulators of a thread that ``mma.sp`` adds to; of Samoyeds, those of one run of V columns."""
        return 4 * self.atoms[0] * self.atoms[1]

    @property
    def sums(self) -> int:
        """All accumulators of a thread: Samoyeds also has those of the even and of the odd output rows."""
        return self.run_sums * (3 if self.pairs else 1)

    @property
    def kept(self) -> tuple[int, int]:
        """Which accumulators, from and up to, hold outputs at the end of a tile."""
        return self.run_sums if self.pairs else 0, self.sums

    @property
    def token_bytes(self) -> int:
        """Tokens of one slot."""
        return self.tile_t * self.tile_k * 2

    @property
    def weight_bytes(self) -> int:
        """Packed weights of one slot for 64 rows."""
        return self.tile_k // BLOCK * BLOCK_BYTES

    @property
    def slot_bytes(self) -> int:
        return self.token_bytes + self.tile_rows // BLOCK * self.weight_bytes

    @property
    def staged_bytes(self) -> int:
        """A token of the epilogue: its outputs, and 16 bytes that put the next token on other banks."""
        return 2 * self.tile_m + 16

    @property
    def shared_bytes(self) -> int:
        """The ring, or the staging buffer that later takes its place."""
        return max(self.stages * self.slot_bytes, self.tile_t * self.staged_bytes)

    def problems(self, arch: str = "sm_90a") -> list[str]:
        """Why the config cannot run on ``arch``; empty if it can.

        >>> MmaConfig(gather=(32, 8)).problems()
        ['gather=(32, 8): v has to be a multiple of 64 and of tile_m=128, so that a tile shares its columns']
        """
        found = []
        if self.dtype not in ("f16", "bf16"):
            found.append(f"dtype={self.dtype}: the operands are f16 or bf16")
        if self.tile_k not in (BLOCK, 2 * BLOCK):
            found.append(f"tile_k={self.tile_k}: a step is one or two blocks of 64")
        if self.threads % self.tile_k:
            found.append(f"tile_k={self.tile_k}, {self.threads} threads: each pass loads whole groups of 8 tokens")
        if self.stages < 2:
            found.append(f"stages={self.stages}: one slot fills while another is read")
        if self.warps > 32 or self.tile_m % self.height or self.warps % max(self.tile_rows // BLOCK, 1):
            found.append(
                f"tile_m={self.tile_m}, {self.warps} warps: whole warps load each block of {self.height} output rows"
            )
        if self.tile_rows % (16 * self.warps_m) or self.atoms[0] not in (1, 2, 4, 8):
            found.append(f"tile_m={self.tile_m}, warps_m={self.warps_m}: a warp has 16, 32, 64 or 128 packed rows")
        if self.tile_t % (8 * self.warps_t) or not self.tile_t:
            found.append(f"tile_t={self.tile_t}, warps_t={self.warps_t}: a warp has whole groups of 8 tokens")
        room = 64 if self.gather else 144 if self.pairs else 128 if self.vector else 64
        if self.sums > room:
            found.append(f"registers: {self.sums} sums a thread; operands and loads leave room for {room}")
        if self.gather and (self.gather[0] % BLOCK or self.gather[0] % self.tile_m):
            found.append(
                f"gather={self.gather}: v has to be a multiple of 64 and of tile_m={self.tile_m}, "
                "so that a tile shares its columns"
            )
        if self.gather and self.pairs:
            found.append("gather, pairs: a weight is V:N:M or Samoyeds")
        if self.gather and not 4 <= self.gather[1] <= 256:
            found.append(f"gather={self.gather}: m is 4 to 256, an index one byte")
        if self.shared_bytes > SHARED_MEMORY[arch]:
            found.append(f"shared memory: {self.shared_bytes} bytes, a block of {arch} has {SHARED_MEMORY[arch]}")
        return found


# Few tokens: the weights stream once, so many bytes have to be under way. Many: large tiles, for the L2 cache.
SHIPPED = (
    MmaConfig(tile_m=64, tile_t=8, tile_k=128, warps_m=4, warps_t=1, stages=8),
    MmaConfig(tile_m=64, tile_t=16, tile_k=128, warps_m=4, warps_t=1, stages=7),
    MmaConfig(tile_m=64, tile_t=32, tile_k=128, warps_m=4, warps_t=1, stages=5),
    MmaConfig(tile_m=128, tile_t=64, tile_k=64, warps_m=4, warps_t=2, stages=5),
    MmaConfig(tile_m=128, tile_t=128, tile_k=64, warps_m=2, warps_t=4, stages=3),
    MmaConfig(tile_m=128, tile_t=128, tile_k=64, warps_m=2, warps_t=2, stages=3),
    MmaConfig(tile_m=256, tile_t=128, tile_k=64, warps_m=4, warps_t=2, stages=4),
)

# Samoyeds: three sums for each of a run, so 96 tokens at most. Steps of 64 columns for runs as short.
SHIPPED_SAMOYEDS = (
    *(
        MmaConfig(tile_m=128, tile_t=tile_t, tile_k=tile_k, warps_m=4, warps_t=1, stages=stages, pairs=True)
        for tile_t, tile_k, stages in ((8, 128, 8), (16, 128, 7), (32, 128, 5), (8, 64, 16), (16, 64, 14), (32, 64, 11))
    ),
    MmaConfig(tile_m=256, tile_t=64, tile_k=64, warps_m=4, warps_t=2, stages=5, pairs=True),
    MmaConfig(tile_m=128, tile_t=96, tile_k=64, warps_m=2, warps_t=2, stages=3, pairs=True),
    MmaConfig(tile_m=256, tile_t=96, tile_k=64, warps_m=4, warps_t=2, stages=4, pairs=True),
)


def token_place(token, chunk, tile_t):
    """Byte offset in a slot of 16-byte ``chunk`` of ``token``. Eight tokens, same chunk: eight different banks of 16.

    >>> [token_place(t, 0, 8) for t in range(3)], token_place(0, 8, 8)
    ([0, 144, 288], 1024)
    """
    return chunk // 8 * (tile_t * 128) + token * 128 + (chunk % 8 ^ token % 8) * 16


def value_row(lane):
    """Byte offset in 16 rows × 32 columns of packed weights of the row whose address ``lane`` gives to ldmatrix.x4.

    >>> [value_row(8 * i) for i in range(4)]
    [0, 512, 128, 640]
    """
    matrix = lane // 8
    return matrix % 2 * 512 + matrix // 2 * 128 + lane % 8 * 16


def metadata_word(lane):
    """Byte offset, in the metadata of 16 rows × 64 columns, of the word that ``lane`` holds: lanes 0 and 1 of each four
    for the first 32 columns (selector 0), lanes 2 and 3 for the others (selector 1).

    >>> [metadata_word(lane) for lane in range(5)]
    [0, 8, 4, 12, 16]
    """
    return (lane // 4 * 4 + lane % 2 * 2 + lane % 4 // 2) * 4


def weights_place(row, weight_bytes):
    """Byte offset, after the tokens of a slot, of the values of 16 rows that start at ``row``.

    >>> weights_place(80, 4608)
    5632
    """
    return row // BLOCK * weight_bytes + row % BLOCK // 16 * 1024


def metadata_place(row, weight_bytes):
    """Byte offset, after the tokens of a slot, of the metadata of 16 rows that start at ``row``."""
    return row // BLOCK * weight_bytes + VALUE_BYTES + row % BLOCK // 16 * 128
