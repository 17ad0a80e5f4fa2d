"""The words of :mod:`nmsparse.cuda.kernels.route` on Numba CUDA. :mod:`~nmsparse.cuda.tile.cpu.route` is the twin.

W warps a CTA, G CTAs, E experts. A warp holds the scores of a token in registers, expert ``32·i + lane`` in number i;
what a word returns, each lane has its own.

**Places**

``first_token()``, ``tokens_a_round()``
    This warp's first token, and ``W·G``: with both, a warp visits its tokens. A round of a CTA is W neighbours.
``lane()``
    0..31.

**The choice**, by a warp

``scores()``, ``ranks()``
    Registers, undefined.
``load_logits(scores, logits_gmem, token, pitch)``
    ``scores = logits[token]`` as fp32; what is beyond the last expert is -inf.
``softmax(scores)``, ``sigmoid(scores)``
    In place, over the experts or each for itself.
``rank(ranks, scores, bias_gmem)``
    ``ranks = scores + bias`` as integers in the same order, 0 beyond the last expert.
``drop_groups(ranks)``
    0 for all experts outside the ``topk_groups`` best groups; ties to the lower group.
``best(ranks, scores) -> expert, score``
    Lane j < k has the expert of the (j+1)-th largest rank, ties to the lower expert, and its score; other lanes 0, 0.
``by_weight(expert, score)``
    How many of the k chosen come before this lane's by score, ties to the lower expert.
``weigh(score)``
    Divided by the sum over the lanes if the router renormalises, times its scale.

The words of the sort are in :mod:`~nmsparse.cuda.tile.gpu.sort`, those between launches in
:mod:`~nmsparse.cuda.tile.gpu.overlap`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from numba import cuda
from numba.cuda import libdevice, types

from ...config_route import TINY
from ...ptx import memory, warp
from ...ptx.numba_glue import callable_of, registers
from .overlap import overlap_words
from .sort import Words, count_words, ends_words, given_words, jit, lane, slot_words

__all__ = ["make_dispatch", "make_route"]

u32, u64, i32, f32 = types.uint32, types.uint64, types.int32, types.float32

divide, across = callable_of(memory.divide_f32), callable_of(warp.shuffle("bfly", "f32"))
from_lane, float_from_lane = callable_of(warp.shuffle("idx", "u32")), callable_of(warp.shuffle("idx", "f32"))
largest, smallest = callable_of(warp.redux("max")), callable_of(warp.redux("min"))


@jit
def rank_of(x):
    """An unsigned integer of the same order as fp32; only -NaN of all bits is 0."""
    bits = u32(libdevice.float_as_int(x))
    return u32(bits ^ (u32(0x80000000) if bits < u32(0x80000000) else u32(0xFFFFFFFF)))


@jit
def of_rank(rank):
    """The fp32 number of a rank."""
    bits = u32(rank ^ (u32(0x80000000) if rank >= u32(0x80000000) else u32(0xFFFFFFFF)))
    return libdevice.int_as_float(i32(bits))


@jit
def sum_of_lanes(x):
    """In a fixed order, the same in each lane."""
    for bit in (16, 8, 4, 2, 1):
        x = f32(x + across(x, u32(bit)))
    return x


def make_route(cfg: Any) -> ModuleType:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config_route.RouteConfig`."""
    words = _token_words(cfg), _score_words(cfg), _choice_words(cfg), slot_words(cfg), count_words(cfg)
    return _module(*words, overlap_words(cfg))


def make_dispatch(cfg: Any) -> ModuleType:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config_route.DispatchConfig`."""
    return _module(given_words(cfg), slot_words(cfg), count_words(cfg), overlap_words(cfg))


def make_ends(cfg: Any) -> ModuleType:
    """The words for ``cfg``, a :class:`~nmsparse.cuda.config_route.EndsConfig`."""
    return _module(ends_words(cfg))


def _module(*parts: Words) -> ModuleType:
    tile = ModuleType("route")
    tile.inline, tile.lane = jit, lane
    for part in parts:
        for word, function in part.items():
            setattr(tile, word, function)
    return tile


def _token_words(cfg: Any) -> Words:
    WARPS, EXPERTS, NUMBERS = cfg.warps, cfg.experts, cfg.numbers
    NOTHING = float("-inf")
    WIDE = cfg.dtype == "f32"
    SIZE = 4 if WIDE else 2
    get = callable_of(memory.load("global", "f32" if WIDE else "u16"))
    unpack = callable_of(memory.unpack("f16" if WIDE else cfg.dtype))

    @jit
    def first_token():
        return i32(cuda.blockIdx.x * WARPS + cuda.threadIdx.x // 32)

    @jit
    def tokens_a_round():
        return i32(cuda.gridDim.x * WARPS)

    @jit
    def load_logits(scores, logits_gmem, token, pitch):
        row = logits_gmem + (u64(token) * u64(pitch) + u64(lane())) * u64(SIZE)
        for i in range(NUMBERS):
            score = f32(NOTHING)
            if 32 * i + lane() < EXPERTS:
                at = row + u64(32 * SIZE * i)
                score = get(at) if WIDE else unpack(u32(get(at)))
            scores[i] = score

    return {"first_token": first_token, "tokens_a_round": tokens_a_round, "load_logits": load_logits}


def _score_words(cfg: Any) -> Words:
    NUMBERS, RENORMALIZE, SCALE = cfg.numbers, cfg.renormalize, cfg.scale

    @jit
    def softmax(scores):
        top = scores[0]
        for i in range(1, NUMBERS):
            top = max(top, scores[i])
        top = of_rank(largest(rank_of(top)))
        total = f32(0)
        for i in range(NUMBERS):
            scores[i] = libdevice.expf(f32(scores[i] - top))
            total = f32(total + scores[i])
        total = sum_of_lanes(total)
        for i in range(NUMBERS):
            scores[i] = divide(scores[i], total)

    @jit
    def sigmoid(scores):
        for i in range(NUMBERS):
            power = libdevice.expf(f32(-abs(scores[i])))
            scores[i] = divide(f32(1) if scores[i] >= f32(0) else power, f32(f32(1) + power))

    @jit
    def weigh(score):
        if RENORMALIZE:
            score = divide(score, f32(sum_of_lanes(score) + f32(TINY)))
        return f32(score * f32(SCALE))

    return {"scores": registers(NUMBERS), "softmax": softmax, "sigmoid": sigmoid, "weigh": weigh}


def _choice_words(cfg: Any) -> Words:
    NUMBERS, EXPERTS, TOP_K, BIAS = cfg.numbers, cfg.experts, cfg.top_k, cfg.bias
    GROUPS, KEPT, GROUP_SIZE, TOP2 = cfg.num_groups, cfg.topk_groups, cfg.experts // cfg.num_groups, cfg.top2
    NONE = 0xFFFF
    get = callable_of(memory.load("global", "f32"))

    @jit
    def rank(ranks, scores, bias_gmem):
        for i in range(NUMBERS):
            ranks[i] = u32(0)
            if 32 * i + lane() < EXPERTS:
                choice = scores[i]
                if BIAS:
                    choice = f32(choice + get(bias_gmem + u64((32 * i + lane()) * 4)))
                ranks[i] = rank_of(choice)

    @jit
    def worth(ranks, group):
        """Rank of a group: of its best expert, or of half the sum of its two best, which cannot overflow."""
        first, second = u32(0), u32(0)  # of this lane
        for i in range(NUMBERS):
            mine = ranks[i] if u32(32 * i + lane()) // u32(GROUP_SIZE) == u32(group) else u32(0)
            second = max(second, min(first, mine))
            first = max(first, mine)
        top = largest(first)
        if TOP2:
            winner = smallest(u32(lane()) if first == top else u32(NONE))
            follower = largest(second if winner == u32(lane()) else first)
            top = rank_of(f32(f32(0.5) * of_rank(top) + f32(0.5) * of_rank(follower)))
        return top

    @jit
    def drop_groups(ranks):
        worths = u32(0)  # of group lane()
        for group in range(GROUPS):
            value = worth(ranks, group)
            worths = value if lane() == group else worths
        kept = u32(0)
        for _ in range(KEPT):
            top = largest(worths)
            winner = smallest(u32(lane()) if worths == top else u32(NONE))
            kept = u32(kept | u32(1) << winner)
            worths = u32(0) if u32(lane()) == winner else worths
        for i in range(NUMBERS):
            group = u32(32 * i + lane()) // u32(GROUP_SIZE)
            ranks[i] = ranks[i] if kept >> group & u32(1) else u32(0)

    @jit
    def best(ranks, scores):
        expert, score = u32(0), f32(0)
        for j in range(TOP_K):
            mine = ranks[0]
            for i in range(1, NUMBERS):
                mine = max(mine, ranks[i])
            top = largest(mine)
            winner = u32(NONE)
            for n in range(NUMBERS):
                i = NUMBERS - 1 - n
                winner = u32(32 * i + lane()) if ranks[i] == top else winner
            winner = smallest(winner)
            value = f32(0)
            for i in range(NUMBERS):
                if winner == u32(32 * i + lane()):
                    ranks[i] = u32(0)
                    value = scores[i]
            value = float_from_lane(value, winner & u32(31)) if BIAS else of_rank(top)
            expert = winner if lane() == j else expert
            score = value if lane() == j else score
        return i32(expert), f32(score)

    @jit
    def by_weight(expert, score):
        before = i32(0)
        for j in range(TOP_K):
            other, name = float_from_lane(score, u32(j)), i32(from_lane(u32(expert), u32(j)))
            before = i32(before + (1 if other > score or (other == score and name < expert) else 0))
        return before

    words = rank, drop_groups, best, by_weight
    return {"ranks": registers(NUMBERS, "u32"), **{word.__name__: word for word in words}}
