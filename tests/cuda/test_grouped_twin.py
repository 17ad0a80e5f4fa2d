"""The grouped kernel text on its CPU twin: right numbers for every kind of weight, epilogue, routing and order."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
from grouped_cases import GroupedCase
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabulary import arguments_of, explained, words_of

from nmsparse.cuda.config_grouped import GroupedConfig
from nmsparse.cuda.kernels import grouped as text
from nmsparse.cuda.tile.cpu import KernelError, grouped
from nmsparse.reference import ACTIVATIONS

PLAIN = GroupedConfig(tile_t=16, stages=3)
GATED = replace(PLAIN, gated=True, activation="silu", gather=True)
KINDS = {"2:4": {}, "samoyeds": {"pairs": True}, "dense": {"dense": True}}
CONFIGS = [
    replace(PLAIN, tile_t=8, stages=2),
    replace(PLAIN, tile_t=8, tile_k=128, gather=True, dtype="bf16"),
    replace(PLAIN, tile_t=48, stages=4, group=1, activation="relu2"),
    replace(PLAIN, tile_t=128, tile_k=128, stages=2, gather=True),
    replace(PLAIN, warpgroups=1, tile_t=32, activation="gelu"),
    replace(GATED, tile_t=8, stages=2, gather=False),
    replace(GATED, tile_k=128),
    replace(GATED, tile_t=32, stages=2, dtype="bf16", activation="gelu_tanh"),
    replace(GATED, tile_t=64, group=2, gather=False, activation="relu"),
    replace(GATED, warpgroups=1, tile_t=16, tile_k=128, activation="identity"),
]
ROUTINGS = {
    "even": (7, 8, 9, 16),
    "one expert has all": (0, 0, 41, 0),
    "empty experts": (0, 3, 0, 0, 17, 0, 1, 0),
    "one expert": (33,),
    "nothing": (0, 0, 0),
    "one token": (0, 1),
    "more experts than lanes": tuple(e % 3 % 2 for e in range(70)),
}
NO_WORDS = {"PRODUCER", "inline"}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def name(cfg):
    sizes = f"{cfg.warpgroups}x{cfg.tile_t}x{cfg.tile_k} stages {cfg.stages} {cfg.dtype} {cfg.activation}"
    return sizes + " gate" * cfg.gated + " gather" * cfg.gather


def columns_of(cfg, k):
    """Columns that the kernel can take: gathered chunks have 16 bytes; a step of dense ones is not padded."""
    k = -(-k // 8) * 8
    return -(-k // cfg.tile_k) * cfg.tile_k if cfg.dense else k


def outputs_of(cfg, outputs):
    """Outputs that the kernel can take: groups of eight rows of a tensor map, sub-rows of gate or of up rows only."""
    return -(-outputs // 8) * 8 if cfg.dense else outputs + (outputs % 2 if cfg.pairs and cfg.gated else 0)


@kinds
@pytest.mark.parametrize("cfg", CONFIGS, ids=name)
def test_the_product_is_right(cfg, kind):
    cfg = replace(cfg, **kind)
    for seed, (counts, outputs, k, guard) in enumerate(
        [((5, 0, 33, 16), 256, 256, 0), ((1, 20, 2), 70, 264, 3), ((0, 9), 8, 200, 8)]
    ):
        v = (128, 256, 512)[seed] if cfg.tile_k == 128 else (64, 128, 256)[seed]
        outputs = outputs_of(cfg, outputs)
        GroupedCase(cfg, counts, outputs, columns_of(cfg, k), workers=1 + seed, v=v, guard=guard).run(seed)


@kinds
@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS)
def test_every_routing(counts, kind):
    GroupedCase(replace(PLAIN, gather=True, **kind), counts, 32, 128, workers=3).run()


@pytest.mark.parametrize("tile_t", [8, 16, 32, 64, 96, 128, 192, 256])
def test_every_tile_of_tokens(tile_t):
    for kind in KINDS.values():
        if tile_t <= 128 or "pairs" not in kind:  # Samoyeds has registers for 128
            cfg = replace(GATED, tile_t=tile_t, stages=2, group=16, **kind)
            GroupedCase(cfg, (tile_t + 3, 0, 2), 40, 128, workers=2).run()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, gated):
    for kind in KINDS.values():
        GroupedCase(replace(PLAIN, activation=activation, gated=gated, **kind), (9, 4), 64, 128).run()


@given(st.data())
@settings(max_examples=40)
def test_any_size_routing_and_order(data):
    cfg = replace(data.draw(st.sampled_from(CONFIGS)), **data.draw(st.sampled_from([*KINDS.values()])))
    counts = tuple(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6)))
    outputs = outputs_of(cfg, data.draw(st.integers(1, 150)))
    k, workers = columns_of(cfg, data.draw(st.integers(1, 300))), data.draw(st.integers(1, 4))
    v, guard = data.draw(st.sampled_from([cfg.tile_k, 256, 512])), data.draw(st.integers(0, 8))
    GroupedCase(cfg, counts, outputs, k, workers=workers, v=v, guard=guard).run(data.draw(st.integers(0, 2**16)))


@kinds
def test_every_order_gives_the_same_bits(kind):
    case = GroupedCase(replace(GATED, **kind), (20, 3, 0, 17), 64, 256, v=64)
    results = {replace(case, workers=workers).run(seed).tobytes() for workers in (1, 2, 5) for seed in range(2)}
    assert len(results) == 1


@kinds
@pytest.mark.parametrize("gather", [False, True], ids=["in order", "gather"])
@pytest.mark.parametrize("before", [0, 5, 40])
def test_a_part_of_the_experts(kind, gather, before):
    """Those before it have other kinds of weights: the plan begins where they end."""
    for counts in ((20, 3, 0, 17), (0, 0, 9), (0, 0)):
        cfg = replace(GATED, gather=gather, part=True, **kind)
        GroupedCase(cfg, counts, 64, 256, workers=2, v=64, before=before).run()


def test_a_plan_that_does_not_fit_is_found():
    for counts, tiles in (((5, 20), (1, 2)), ((5, 20), (2, 3)), ((20, 5), (1, 2))):

        class Other(GroupedCase):
            def routing(self, tiles=tiles):
                rows, plan = super().routing()
                plan[len(tiles) :] = tiles
                return rows, plan

        with pytest.raises(KernelError, match="expected a plan of ends"):
            Other(PLAIN, counts, 32, 128).run()


@pytest.mark.parametrize("row", [-1, 20])
def test_a_row_that_x_does_not_have_is_found(row):
    class Other(GroupedCase):
        def routing(self):
            rows, plan = super().routing()
            rows[-1] = row
            return rows, plan

    with pytest.raises(KernelError, match="gathers columns from element"):
        Other(replace(PLAIN, gather=True), (5, 4), 32, 128).run()


def test_the_vocabulary_is_what_the_text_says_and_the_page_explains():
    said, page = words_of(inspect.getsource(text)), explained("gemm") | explained("samoyeds")
    assert said == set(vars(grouped.make(CONFIGS[0])))
    assert set(explained("grouped")) <= said <= {*page, *explained("grouped"), *NO_WORDS}


@kinds
def test_arguments_on_the_page_are_those_of_the_words(kind):
    page = explained("gemm") | explained("samoyeds") | explained("grouped")
    for gather in (False, True):
        for word, function in vars(grouped.make(replace(PLAIN, gather=gather, **kind))).items():
            if word not in NO_WORDS and arguments_of(function) != ["args"]:  # of what means nothing for these weights
                assert page[word] == arguments_of(function), word
