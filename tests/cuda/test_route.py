"""Routing and sorting on a GPU: the texts on the twin, planted mistakes, compiled without a device, on a GPU."""

from __future__ import annotations

import contextlib
import inspect
import re
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_code import assert_overlaps, disassembled

from nmsparse import NMSparseError
from nmsparse.cuda import launch, route
from nmsparse.cuda.array import from_host
from nmsparse.cuda.config_route import DispatchConfig, EndsConfig, RouteConfig
from nmsparse.cuda.kernels import route as kernels
from nmsparse.cuda.route import Dispatch, Route, Sorted, counters
from nmsparse.cuda.tile.cpu import KernelError
from nmsparse.cuda.tile.cpu import route as twin
from nmsparse.moe import Router

UNTOUCHED = -7777
DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
INTS = {"s32": np.int32, "s64": np.int64}

# Those of the published models, and others that are smaller or larger.
ROUTERS = {
    "mixtral": (8, Router(2, renormalize=True)),
    "qwen2-moe": (60, Router(4)),
    "qwen3": (128, Router(8, renormalize=True)),
    "deepseek-v2": (160, Router(6, num_groups=8, topk_groups=3, scale=16.0)),
    "deepseek-v3": (256, Router(8, "sigmoid", True, 8, 4, "top2", 2.5)),
    "one": (1, Router(1)),
    "all": (5, Router(5, "sigmoid")),
    "many": (512, Router(16, renormalize=True)),
    "widest": (40, Router(32, num_groups=5, topk_groups=4)),
}


def config_of(name, **options):
    experts, router = ROUTERS[name]
    fields = {field: getattr(router, field) for field in router.__dataclass_fields__}
    return RouteConfig(experts, **{**fields, "threads": 64, **options}), router


def frozen(array):
    array = np.array(array)
    array.flags.writeable = False
    return array


def results(tokens, cfg):
    """What a launch writes, and its counters."""
    slots = tokens * cfg.top_k
    shapes = {name: (tokens, cfg.top_k) for name in ("ids", "weights", "slots")} | {
        "rows": slots,
        "plan": (2, cfg.experts) if cfg.kept is None else (cfg.kept + 1, 2),
    }
    types = {"weights": np.float32}
    found = {name: np.full(shape, UNTOUCHED, types.get(name, np.int32)) for name, shape in shapes.items()}
    return {**found, "counter": np.zeros(counters(cfg.experts), np.int32)}


def run_route(cfg, logits, bias=None, grid=1, tile_t=16, make=kernels.make_route, seed=0, order=None):
    """Logits and bias through the text on the twin."""
    tokens, experts = logits.shape
    wide = np.full((tokens, experts + 3), np.nan, np.float32).astype(logits.dtype)
    wide[:, :experts] = logits
    out = results(tokens, cfg)
    memory = frozen(wide), frozen(np.zeros(0, np.float32) if bias is None else bias), *out.values()
    with copied_tokens(cfg, tokens, out) as (copy, sizes):
        arguments = *memory, given_order(order), *copy, tokens, tile_t, *sizes, experts + 3
        twin.launch(make, twin.make_route, cfg, grid, arguments, seed)
    return out


def run_dispatch(cfg, ids, weights, grid=1, tile_t=16, make=kernels.make_dispatch, seed=0, order=None):
    """A given routing through the text on the twin."""
    out = results(len(ids), cfg)
    memory = frozen(ids), frozen(weights), *(out[name] for name in ("weights", "slots", "rows", "plan", "counter"))
    with copied_tokens(cfg, len(ids), out) as (copy, sizes):
        arguments = *memory, given_order(order), *copy, len(ids), tile_t, *sizes
        twin.launch(make, twin.make_dispatch, cfg, grid, arguments, seed)
    return out


def given_order(order):
    return None if order is None else frozen(np.asarray(order, np.int32))


@contextlib.contextmanager
def copied_tokens(cfg, tokens, out):
    """Tokens whose numbers say where they are, and room for their copies: checked in the end, if there are any."""
    pieces, pitch = 2, 19
    x = np.arange(tokens * pitch, dtype=np.int32).reshape(tokens, pitch)
    copy = np.full((tokens * cfg.top_k if cfg.copies else 0, 8 * pieces), UNTOUCHED, np.int32)
    yield (frozen(x), copy), (pitch, pieces)
    known = (out["slots"] >= 0).sum() if cfg.copies else 0
    np.testing.assert_array_equal(copy[:known], x[out["rows"][:known], : 8 * pieces])
    assert (copy[known:] == UNTOUCHED).all()


def check_sorted(out, ids, experts, tile_t, order=None):
    """Whether slots, rows and plan are those of ``ids``, in NumPy, up to the order within an expert.

    ``order``: the experts in an order of their own, those that it lacks dropped.
    """
    ids, plan = np.asarray(ids), np.asarray(out["plan"])
    if order is not None:  # from here on an expert is its place in the order
        np.testing.assert_array_equal(plan[0], 0)
        place, plan = np.full(experts, -1), plan[1:].T
        place[order], experts = np.arange(len(order)), len(order)
        ids = np.where((ids >= 0) & (ids < len(place)), place[np.clip(ids, 0, len(place) - 1)], -1)
    known = (ids >= 0) & (ids < experts)
    counts = np.bincount(ids[known].astype(np.int64), minlength=experts)
    ends = np.cumsum(counts)
    np.testing.assert_array_equal(plan, [ends, np.cumsum(-(-counts // tile_t))])
    slots, experts_of = out["slots"], ids[known].astype(np.int64)
    np.testing.assert_array_equal(slots[~known], -1)
    assert (np.sort(slots[known]) == np.arange(known.sum())).all(), "positions are not a permutation"
    assert (slots[known] < ends[experts_of]).all() and (slots[known] >= (ends - counts)[experts_of]).all()
    np.testing.assert_array_equal(out["rows"][slots[known]], np.nonzero(known)[0])
    np.testing.assert_array_equal(out["rows"][known.sum() :], UNTOUCHED)
    np.testing.assert_array_equal(out["counter"], 0)


def logits_of(kind, tokens, experts, rng):
    x = rng.standard_normal((tokens, experts))
    if kind == "skewed":
        x += 8 * (rng.random(experts) < 0.2)
    elif kind == "ties":
        x = np.round(x)
    elif kind == "one":
        x[:] = np.arange(experts)[::-1] * 0.01
    elif kind == "far":
        x *= 1e3
    return x


# --- the texts, on the twin ------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(list(ROUTERS)),
    kind=st.sampled_from(["normal", "skewed", "ties", "one", "far"]),
    dtype=st.sampled_from(list(DTYPES)),
    biased=st.booleans(),
    copies=st.booleans(),
    tokens=st.integers(0, 30),
    grid=st.integers(1, 4),
    tile_t=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_route_is_the_router_and_a_sort(name, kind, dtype, biased, copies, tokens, grid, tile_t, seed):
    cfg, router = config_of(name, dtype=dtype, bias=biased, copies=copies)
    rng = np.random.default_rng(seed)
    logits = logits_of(kind, tokens, cfg.experts, rng).astype(DTYPES[dtype])
    bias = rng.standard_normal(cfg.experts).astype(np.float32) if biased else None
    out = run_route(cfg, logits, bias, grid, tile_t, seed=seed)
    ids, weights = router(logits, bias)
    np.testing.assert_array_equal(out["ids"], ids)
    np.testing.assert_allclose(out["weights"], weights, rtol=1e-6)
    check_sorted(out, ids, cfg.experts, tile_t)


@st.composite
def routings(draw):
    """Ids (T, k): any, skewed, all to one expert, some or all of them no experts at all."""
    tokens, experts = draw(st.integers(0, 60)), draw(st.sampled_from([1, 2, 7, 33, 64, 512]))
    top_k = draw(st.integers(1, min(experts, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["even", "skewed", "one", "dropped", "none"]))
    if kind == "one":
        ids = np.full((tokens, top_k), rng.integers(experts))
    else:
        likely = rng.random((tokens, experts)) ** (1 if kind == "even" else np.arange(1, experts + 1))
        ids = np.argsort(-likely, axis=1)[:, :top_k]
    if kind == "dropped":
        wild = rng.choice([-1, -(2**31), experts, 2**31 - 1, 1023, 1024], ids.shape)
        ids = np.where(rng.random(ids.shape) < 0.3, wild, ids)
    elif kind == "none":
        ids = np.full_like(ids, -1)
    return ids, experts


@given(
    routing=routings(),
    id_type=st.sampled_from(list(INTS)),
    weight_type=st.sampled_from(list(DTYPES)),
    copies=st.booleans(),
    grid=st.integers(1, 4),
    tile_t=st.integers(1, 300),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_dispatch_is_a_sort(routing, id_type, weight_type, copies, grid, tile_t, seed):
    ids, experts = routing
    cfg = DispatchConfig(experts, ids.shape[1], id_type, weight_type, copies, threads=64)
    weights = np.random.default_rng(seed).random(ids.shape).astype(DTYPES[weight_type])
    out = run_dispatch(cfg, ids.astype(INTS[id_type]), weights, grid, tile_t, seed=seed)
    check_sorted(out, ids, experts, tile_t)
    wanted = weights.astype(np.float32) if cfg.converts else UNTOUCHED
    np.testing.assert_array_equal(out["weights"], np.broadcast_to(wanted, ids.shape))


@given(
    routing=routings(),
    dropped=st.integers(0, 3),
    copies=st.booleans(),
    grid=st.integers(1, 3),
    tile_t=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_experts_in_an_order_of_their_own(routing, dropped, copies, grid, tile_t, seed):
    ids, experts = routing
    order = np.random.default_rng(seed).permutation(experts)
    kept = max(1, experts - dropped)
    cfg = DispatchConfig(experts, ids.shape[1], copies=copies, kept=kept, threads=64)
    given = np.clip(ids, -1, 600).astype(np.int32), np.zeros(ids.shape, np.float32)
    out = run_dispatch(cfg, *given, grid, tile_t, seed=seed, order=order)
    check_sorted(out, given[0], experts, tile_t, order[:kept])


@pytest.mark.parametrize("grid", [1, 3])
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "deepseek-v3"])
def test_routed_experts_in_an_order_of_their_own(name, grid):
    cfg, router = config_of(name)
    order, kept = np.random.default_rng(0).permutation(cfg.experts), cfg.experts - 2
    logits = np.random.default_rng(1).standard_normal((30, cfg.experts)).astype(np.float32)
    out = run_route(replace(cfg, kept=kept), logits, None, grid, 4, order=order)
    np.testing.assert_array_equal(out["ids"], router(logits)[0])
    check_sorted(out, out["ids"], cfg.experts, 4, order[:kept])


@pytest.mark.parametrize("ids", list(INTS))
def test_ends_become_a_plan(ids):
    counts = np.array([0, 5, 16, 17, 0, 33, 1])
    plan = np.full((2, 7), UNTOUCHED, np.int32)
    cfg = EndsConfig(7, ids)
    ends = np.cumsum(counts).astype(INTS[ids])
    twin.launch(kernels.make_ends, twin.make_ends, cfg, 1, (frozen(ends), plan, 16))
    np.testing.assert_array_equal(plan, [ends, np.cumsum(-(-counts // 16))])
    pytest.importorskip("numba_cuda", reason="needs numba-cuda")
    assert launch.compiled(cfg, "sm_90a").resources()["spill_stores"] == 0


def test_an_id_of_64_bits_is_not_cut_off():
    ids = np.array([[2**32, 1], [0, -(2**32)], [2**62 + 1, 2**40]])
    out = run_dispatch(DispatchConfig(4, 2, "s64", threads=32), ids, np.zeros(ids.shape, np.float32))
    check_sorted(out, ids, 4, 16)


# --- planted mistakes ------------------------------------------------------------------------------------------------

AWAIT, EARLY = "tile.await_previous()", "touches global memory, which the previous launch may; say await_previous"
RACE, TWICE, UNKNOWN = "at the same time", "is stored again|stores twice", "before anything was stored"
WRONG = AssertionError, "not equal|Not equal to tolerance|not a permutation"


@dataclass(frozen=True)
class Mutant:
    """``old`` is replaced by ``new`` in the text; the twin answers with ``kind`` and words like ``says``."""

    name: str
    old: str
    new: str
    kind: type[Exception]
    says: str
    last: bool = False  # replace the last place, not the first
    given: bool = False  # in the text of `dispatch`


BARRIER = "tile.barrier()\n"
MUTANTS = [
    Mutant("the previous launch not awaited", AWAIT, "pass", KernelError, EARLY),
    Mutant("awaited by the first warp", AWAIT, f"if not tile.first_token(): {AWAIT}", KernelError, EARLY),
    Mutant("counters used too early", AWAIT, f"tile.reserve(counter_gmem); {AWAIT}", KernelError, EARLY),
    Mutant("not awaited by dispatch", AWAIT, "pass", KernelError, EARLY, given=True),
    Mutant("counts not cleared", "tile.clear()", "pass", KernelError, UNKNOWN),
    Mutant("no barrier after the clear", BARRIER, "pass\n", KernelError, f"{RACE}|{UNKNOWN}"),
    Mutant("no barrier after the count", BARRIER + "        tile.reserve", "tile.reserve", KernelError, RACE),
    Mutant("no barrier after the reservation", BARRIER + "        tile.meet", "tile.meet", KernelError, RACE),
    Mutant("no barrier after the plan", BARRIER, "pass\n", KernelError, f"{RACE}|{TWICE}", last=True),
    Mutant("nothing reserved", "tile.reserve(counter_gmem)", "pass", KernelError, UNKNOWN),
    Mutant("CTAs do not meet", "tile.meet(counter_gmem)", "pass", KernelError, f"{RACE}|expected zeros at the end"),
    Mutant("met before the reservation", "tile.reserve(counter_gmem)", "tile.meet(counter_gmem)", KernelError, UNKNOWN),
    Mutant("no plan", "tile.plan(plan_gmem, counter_gmem, order_gmem, tile_t)", "pass", KernelError, TWICE),
    Mutant("other tiles", "order_gmem, tile_t)\n        tile.b", "order_gmem, 7)\n        tile.b", *WRONG),
    Mutant("counters stay", "tile.leave(counter_gmem)", "pass", KernelError, "expected zeros at the end"),
    Mutant("left twice", "tile.leave(c", "tile.leave(counter_gmem); tile.leave(c", KernelError, f"{RACE}|zeros at the"),
    Mutant("a warp stays away", BARRIER, "tile.barrier() if tile.first_token() else None\n",
           KernelError, f"{RACE}|{UNKNOWN}|block's barrier"),
    Mutant("all warps route one token", "token = tile.first_token()", "token = 0", KernelError, f"{RACE}|{TWICE}"),
    Mutant("a token left out", "while token < tokens", "while token < tokens - 1", KernelError, UNKNOWN),
    Mutant("a token too many", "while token < tokens", "while token <= tokens", KernelError, "outside"),
    Mutant("a round too long", "token += tile", "token += 1 + tile", KernelError, f"{RACE}|{TWICE}|{UNKNOWN}"),
    Mutant("logits with another pitch", "token, pitch)", "token, cfg.experts)", *WRONG),
    Mutant("no softmax", "tile.softmax(scores)", "pass", *WRONG),
    Mutant("ranks not made", "tile.rank(ranks, scores, bias_gmem)", "pass", *WRONG),
    Mutant("groups not dropped", "tile.drop_groups(ranks)", "pass", *WRONG),
    Mutant("in the order of the ranks", "if BIAS else tile.lane()", "if not BIAS else tile.lane()", *WRONG),
    Mutant("raw scores", "tile.weigh(score)", "score", *WRONG),
    Mutant("one choice too many", "tile.lane() < TOP_K", "tile.lane() <= TOP_K", KernelError, f"{RACE}|{TWICE}"),
    Mutant("one choice too few", "tile.lane() < TOP_K", "tile.lane() < TOP_K - 1", KernelError, UNKNOWN),
    Mutant("slots of other tokens", "slot = token * TOP_K", "slot = token * 2", KernelError, f"{RACE}|{TWICE}"),
    Mutant("not parked", "tile.park(", "(lambda *_: None)(", KernelError, UNKNOWN),
    Mutant("not counted", "tile.count(expert, chosen)", "tile.lane() * 0", KernelError, TWICE),
    Mutant("counted twice", "tile.count(expert, chosen)", "tile.count(expert, chosen) + tile.count(expert, chosen)",
           KernelError, f"outside|{TWICE}|{RACE}"),
    Mutant("slots beyond the last", "exists = slot < slots", "exists = slot >= 0", KernelError, "outside", last=True),
    Mutant("one turn too few", "range(tile.turns(slots))", "range(tile.turns(slots) - 1)", *WRONG, last=True),
    Mutant("every turn the first", "slot = tile.slot(turn)", "slot = tile.slot(0)",
           KernelError, f"outside|{TWICE}", last=True),
    Mutant("rows of slots", "tile.token_of(slot)", "slot", *WRONG),
    Mutant("ranks for positions", "tile.position(expert, rank)", "rank", KernelError, f"{RACE}|{TWICE}"),
    Mutant("slots not stored", "tile.store_int(slots_gmem, slot, position, exists)", "pass", *WRONG),
    Mutant("rows of dropped slots", "position >= 0)", "exists)", KernelError, "outside", given=True),
    Mutant("dropped slots counted", "expert >= 0)", "exists)", KernelError, "outside", given=True),
    Mutant("weights not converted", "if CONVERTS", "if not CONVERTS", *WRONG, given=True),
    Mutant("ids beyond the last", "exists = slot < slots", "exists = slot >= 0", KernelError, "outside", given=True),
]  # fmt: skip


def run_mutant(module, given, seed):
    """Several rounds and turns for each CTA, experts of both warps, every option that the text asks for."""
    rng = np.random.default_rng(0)
    if given:
        ids = rng.integers(-1, 41, (50, 3))
        cfg = DispatchConfig(40, 3, "s32", "f16", threads=64)
        weights = rng.random(ids.shape).astype(np.float16)
        out = run_dispatch(cfg, ids.astype(np.int32), weights, 2, 4, module["make_dispatch"], seed)
        np.testing.assert_array_equal(out["weights"], weights)
        check_sorted(out, ids, 40, 4)
        return
    router = Router(3, "softmax", True, 4, 2, "max", 2.0)
    fields = {field: getattr(router, field) for field in router.__dataclass_fields__}
    cfg = RouteConfig(40, bias=True, threads=64, **fields)
    logits, bias = rng.standard_normal((70, 40)).astype(np.float32), rng.standard_normal(40).astype(np.float32) / 20
    out = run_route(cfg, logits, bias, 3, 4, module["make_route"], seed)
    ids, weights = router(logits, bias)
    np.testing.assert_array_equal(out["ids"], ids)
    np.testing.assert_allclose(out["weights"], weights, rtol=1e-6)
    check_sorted(out, ids, 40, 4)


def module_of(text):
    names = {}
    exec(compile(text, "mutant", "exec"), names)
    return names


@pytest.mark.parametrize("given", [False, True], ids=["route", "dispatch"])
@pytest.mark.parametrize("seed", range(3))
def test_the_text_itself_passes(given, seed):
    run_mutant(module_of(inspect.getsource(kernels)), given, seed)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_is_found(mutant):
    text = inspect.getsource(kernels)
    part = text.index("def make_dispatch") if mutant.given else 0
    head, body = text[:part], text[part:]
    assert mutant.old in body, f"the kernel text no longer says {mutant.old!r}: update this mutant"
    if mutant.last:
        before, after = body.rsplit(mutant.old, 1)
        body = before + mutant.new + after
    else:
        body = body.replace(mutant.old, mutant.new, 1)
    module = module_of(head + body)
    for seed in range(3):
        with pytest.raises(mutant.kind, match=mutant.says):
            run_mutant(module, mutant.given, seed)


# --- the entry -------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_twin(monkeypatch):
    """``Route`` and ``Dispatch`` on a GPU of two SMs that is the twin; addresses are numbers of arrays."""
    arrays, launches = {}, []

    def kernel_of(config, device):
        name = "route" if isinstance(config, RouteConfig) else "dispatch"
        make, words = getattr(kernels, f"make_{name}"), getattr(twin, f"make_{name}")

        def run(grid, stream, *arguments):
            given = [arrays.get(a) if kind == "p" else a for a, kind in zip(arguments, config.signature, strict=True)]
            launches.append((grid, config.threads))
            twin.launch(make, words, config, grid, given)

        return run

    monkeypatch.setattr(launch, "kernel_of", kernel_of)
    monkeypatch.setattr(launch, "model_of", lambda device: replace(launch.H200, sms=2))

    def address(array):
        arrays[len(arrays) + 1] = array  # 0 is no address
        return len(arrays)

    return address, launches


@pytest.mark.parametrize(("tokens", "launched"), [(0, (1, 256)), (8, (1, 256)), (9, (1, 1024)), (65, (2, 1024))])
def test_route_launches_what_fits(on_twin, tokens, launched):
    address, launches = on_twin
    cfg, router = config_of("mixtral", bias=True)
    rng = np.random.default_rng(0)
    logits, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((tokens, 8), (8,)))
    out = results(tokens, cfg)
    ids, weights, *to = map(address, out.values())
    Route(cfg, 0)(0, address(frozen(logits)), 8, address(frozen(bias)), ids, weights, Sorted(*to), tokens, 16)
    assert launches == [launched]
    np.testing.assert_array_equal(out["ids"], router(logits, bias)[0])
    check_sorted(out, out["ids"], 8, 16)


@pytest.mark.parametrize(("tokens", "launched"), [(0, (1, 256)), (85, (1, 256)), (86, (1, 1024)), (2000, (2, 1024))])
def test_dispatch_launches_what_fits(on_twin, tokens, launched):
    address, launches = on_twin
    ids = np.random.default_rng(0).integers(0, 5, (tokens, 3)).astype(np.int32)
    cfg = DispatchConfig(4, 3, weights="bf16")
    out, given = results(tokens, cfg), np.ones(ids.shape, DTYPES["bf16"])
    to = Sorted(*(address(out[name]) for name in ("slots", "rows", "plan", "counter")))
    Dispatch(cfg, 0)(0, address(frozen(ids)), address(frozen(given)), address(out["weights"]), to, tokens, 16)
    assert launches == [launched]
    np.testing.assert_array_equal(out["weights"], 1)
    check_sorted(out, ids, 4, 16)


def test_what_cannot_run_is_explained(on_twin):
    with pytest.raises(NMSparseError, match=r"top_k=9: 1 to 32, a lane for each, and at most the experts"):
        Route(RouteConfig(8, 9), 0)
    with pytest.raises(NMSparseError, match=r"experts=513: 1 to 512"):
        Dispatch(DispatchConfig(513, 2), 0)
    with pytest.raises(NMSparseError, match="expected fewer than 4194304 tokens"):
        Route(RouteConfig(8, 2), 0)(*[0] * 6, Sorted(*[0] * 4), 1 << 22, 16)
    assert len(RouteConfig(1000, 40, num_groups=50, topk_groups=2, dtype="f64").problems()) == 4
    assert len(DispatchConfig(0, 0, "u8", "f64").problems()) == 4


# --- compiled, without a device --------------------------------------------------------------------------------------

QUICK = [config_of("qwen2-moe", dtype="f16", threads=256)[0], DispatchConfig(64, 6)]
OTHERS = [
    *(config_of(name, bias=name == "deepseek-v3", threads=1024)[0] for name in ROUTERS if name != "qwen2-moe"),
    config_of("many", dtype="bf16", bias=True, threads=512)[0],
    DispatchConfig(512, 16, "s64", "bf16", threads=256),
    DispatchConfig(8, 2, "s64", copies=True, threads=256),
    DispatchConfig(64, 6, kept=60),
    config_of("mixtral", dtype="bf16", copies=True, threads=256)[0],
    config_of("deepseek-v3", bias=True, copies=True, threads=256)[0],
    config_of("deepseek-v3", bias=True, kept=250, threads=1024)[0],
]
CONFIGS = [(cfg, "sm_90a") for cfg in QUICK]
CONFIGS += [
    pytest.param(cfg, arch, marks=pytest.mark.slow)
    for arch in ("sm_80", "sm_90a", "sm_120")
    for cfg in (*OTHERS, *QUICK)
    if (cfg, arch) not in CONFIGS
]


@pytest.mark.parametrize(("cfg", "arch"), CONFIGS, ids=str)
def test_it_compiles_without_spills(cfg, arch, tmp_path):
    pytest.importorskip("numba_cuda", reason="needs numba-cuda", exc_type=ImportError)
    from nmsparse.cuda import compiler

    cfg = replace(cfg, overlaps=arch != "sm_80")
    cubin = compiler.compile_kernel(launch.TEXTS[type(cfg)](cfg), cfg.signature, arch, threads=cfg.threads)
    used = cubin.resources()
    assert used["spill_stores"] == used["spill_loads"] == used["stack"] == 0
    assert 0 < used["registers"] <= 64 * 1024 // cfg.most_threads and cfg.threads <= cfg.most_threads
    code = disassembled(cubin.code, tmp_path)
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert_overlaps(code, cfg.overlaps)
    if arch != "sm_80":  # which has shuffles of lanes that are not together out of line
        assert not re.search(r"\bCALL\b", code), "a division of 64 bits, or one that is exactly rounded"


def test_the_two_vocabularies_are_the_same():
    pytest.importorskip("numba_cuda", reason="needs numba-cuda", exc_type=ImportError)
    from nmsparse.cuda.tile.gpu import route as gpu

    for make, cfg in (("make_route", QUICK[0]), ("make_dispatch", QUICK[1])):
        on_cpu, on_gpu = (vars(getattr(module, make)(cfg)) for module in (twin, gpu))
        words = {word for word in on_gpu if not word.startswith("__")}
        assert words == set(on_cpu)
        for word in words - {"scores", "ranks", "inline"}:
            arguments = list(inspect.signature(on_gpu[word].py_func).parameters)
            assert arguments == list(inspect.signature(on_cpu[word]).parameters), word


# --- on a GPU --------------------------------------------------------------------------------------------------------


def on_gpu(out):
    """Results as arrays of the device, and a function that brings them back into ``out``."""
    held = {name: from_host(array) for name, array in out.items()}

    def fetch():
        for name, array in held.items():
            out[name][...] = array.numpy()

    return [array.pointer if array.size else 0 for array in held.values()], fetch


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "skewed", "one"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 64, 65, 1000, 16384])
@pytest.mark.parametrize("name", ROUTERS)
def test_gpu_route(name, tokens, kind):
    cfg, router = config_of(name, bias=name == "deepseek-v3", dtype=["f32", "f16", "bf16"][tokens % 3])
    rng = np.random.default_rng(tokens)
    logits = logits_of(kind, tokens, cfg.experts, rng).astype(DTYPES[cfg.dtype])
    bias = rng.standard_normal(cfg.experts).astype(np.float32) if cfg.bias else None
    inputs = [from_host(a) if a is not None and a.size else None for a in (logits, bias)]
    run, out = Route(cfg, 0), results(tokens, cfg)
    (to_ids, to_weights, *to), fetch = on_gpu(out)
    given = [a.pointer if a is not None else 0 for a in inputs]
    for _ in range(3):  # the counters are zero again after each
        run(0, given[0], cfg.experts, given[1], to_ids, to_weights, Sorted(*to), tokens, 16)
    fetch()
    ids, weights = router(logits, bias)
    check_sorted(out, out["ids"], cfg.experts, 16)
    np.testing.assert_allclose(out["weights"], weights, rtol=1e-5, atol=1e-7)
    same = np.sort(out["ids"], axis=1) == np.sort(ids, axis=1)
    # Scores that agree but for the last bits may change places, also at the end of the list.
    assert same.mean() > 0.999 if same.size else True
    in_place = out["ids"] == ids
    swapped = ~in_place.all(axis=1)
    assert swapped.mean() < 0.02 if len(swapped) else True


@pytest.mark.gpu
@given(
    routing=routings(),
    id_type=st.sampled_from(list(INTS)),
    weight_type=st.sampled_from(list(DTYPES)),
    repeat=st.sampled_from([1, 20, 300]),
)
@settings(max_examples=60, deadline=None)
def test_gpu_dispatch(routing, id_type, weight_type, repeat):
    ids, experts = routing
    ids = np.tile(ids, (repeat, 1)).astype(INTS[id_type])
    cfg = DispatchConfig(experts, ids.shape[1], id_type, weight_type)
    weights = np.random.default_rng(0).random(ids.shape).astype(DTYPES[weight_type])
    here = [from_host(a) for a in (ids, weights)]
    out = results(len(ids), cfg)
    (_, to_weights, *to), fetch = on_gpu(out)
    run = Dispatch(cfg, 0)
    for _ in range(2):
        run(0, *(a.pointer if a.size else 0 for a in here), to_weights, Sorted(*to), len(ids), 16)
    fetch()
    check_sorted(out, ids, experts, 16)
    if cfg.converts:
        np.testing.assert_array_equal(out["weights"], weights.astype(np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 40, 3000])
@pytest.mark.parametrize("kept", [1, 33, 40])
def test_gpu_experts_in_an_order_of_their_own(tokens, kept):
    rng = np.random.default_rng(tokens)
    ids = rng.random((tokens, 40)).argsort(axis=1)[:, :3].astype(np.int32)
    order = rng.permutation(40).astype(np.int32)
    cfg = DispatchConfig(40, 3, kept=kept)
    out = results(tokens, cfg)
    (_, weights, *to), fetch = on_gpu(out)
    given, places = from_host(ids), from_host(order)
    run = Dispatch(cfg, 0)
    for _ in range(2):
        run(0, given.pointer, weights, weights, Sorted(*to, places.pointer), tokens, 16)
    fetch()
    check_sorted(out, ids, 40, 16, order[:kept])


def test_the_counters_have_room_for_the_two_of_the_meeting():
    assert counters(8) == 10 and route.MAX_TOKENS == 1 << 22
