"""Mistakes planted in the kernel text: the twin finds each, and says what is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gemm_cases import Case
from mutants import Mutant, maker_of, mutated, text_of

from nmsparse.cuda.config import GemmConfig
from nmsparse.cuda.kernels.gemm import make_gemm
from nmsparse.cuda.tile.cpu import Deadlock, KernelError, barrier, words

# Three workers: five whole tiles, and one that they share. 150 rows: the last tile has one of two blocks.
CASE = Case(GemmConfig(warpgroups=2, tile_t=16, stages=2), rows=150, tokens=40, k=256, workers=3, split=1, parts=3)
CLUSTER = Case(GemmConfig(warpgroups=1, tile_t=16, stages=6), rows=100, tokens=20, k=512, parts=2)
SEEDS = range(3)
WRONG = AssertionError, "Not equal to tolerance"


PIECE = "number, first, last = tile.piece(index, tiles, split, parts, steps)"
PLACE = "row, token = tile.place(number, row_tiles, token_tiles)"
WAIT_RELEASE = "tile.wait_wgmma_but_one()\n                        tile.release(ring, turn - 1)"
RELEASE_WAIT = "tile.release(ring, turn - 1)\n                        tile.wait_wgmma_but_one()"
TOKENS = "tile.load_tokens(ring, turn, x_gmem, token, step)"
FILL = """tile.expect(ring, turn, row, rows)
                        tile.load_tokens(ring, turn, x_gmem, token, step)
                        tile.load_weights(ring, turn, w_gmem, row, step, rows, k_blocks)"""
RELEASE_EVEN = "tile.release(ring, turn - 1)\n                        turn += 1"
FINAL_RELEASE = "tile.release(ring, turn - 1)\n                if"
FINAL_WAIT = "tile.wait_wgmma()\n                "
STORE = "tile.store(acc, ring, y_gmem, bias_gmem, row, token, rows, tokens, pitch, cluster)"
REDUCE = "tile.reduce_scatter(acc, ring, cluster)"

MUTANTS = [
    Mutant("wait_full dropped", "tile.wait_full(ring, turn)", "pass", KernelError, "waited until it was full"),
    Mutant("wait_empty dropped", "tile.wait_empty(ring, turn)", "pass", KernelError, "waited until it was empty"),
    Mutant("wait_wgmma_but_one dropped", "tile.wait_wgmma_but_one()", "pass", KernelError, "while the wgmma group"),
    Mutant("released before the wait", WAIT_RELEASE, RELEASE_WAIT, KernelError, "while the wgmma group"),
    Mutant(
        "released one turn too early", "release(ring, turn - 1)", "release(ring, turn)", KernelError, "while the wgmma"
    ),
    Mutant("released one turn too late", "if step > 0", "if step >= 0", KernelError, "expected 0 or more"),
    Mutant(
        "released twice",
        FINAL_RELEASE,
        "tile.release(ring, turn - 1); " + FINAL_RELEASE,
        KernelError,
        "but has released",
    ),
    Mutant(
        "odd steps never released",
        "tile.release(ring, turn - 1)",
        "pass",
        Deadlock,
        r"producer of CTA 0 waits for turn 3: parity 0 of empty\[1\]",
    ),
    Mutant(
        "even steps never released",
        RELEASE_EVEN,
        RELEASE_EVEN.replace("tile.release(ring, turn - 1)", "pass"),
        Deadlock,
        r"producer of CTA 0 waits for turn 2: parity 0 of empty\[0\]",
    ),
    Mutant(
        "not released at the end",
        FINAL_RELEASE,
        "if",
        Deadlock,
        r"producer of CTA . waits for turn 5: parity 1 of empty\[1\]",
    ),
    Mutant(
        "not released at the end of one tile",
        FINAL_RELEASE,
        "if",
        KernelError,
        "released 3 of 4 fills",
        case=Case(CASE.cfg, rows=128, tokens=16, k=512),
    ),
    Mutant(
        "wait_full: next phase",
        "wait_full(ring, turn)",
        "wait_full(ring, turn + cfg.stages)",
        KernelError,
        "waited until it was full",
    ),
    Mutant(
        "wait_empty: next phase",
        "wait_empty(ring, turn)",
        "wait_empty(ring, turn + cfg.stages)",
        Deadlock,
        r"producer of CTA 0 waits for turn 2: parity 0 of empty\[0\]",
    ),
    Mutant("wait_full: other slot", "wait_full(ring, turn)", "wait_full(ring, turn + 1)", KernelError, "full"),
    Mutant(
        "too few bytes expected",
        "expect(ring, turn, row, rows)",
        "expect(ring, turn, row, 0)",
        KernelError,
        "announced too few",
    ),
    Mutant(
        "too many bytes expected",
        "expect(ring, turn, row, rows)",
        "expect(ring, turn, 0, rows)",
        Deadlock,
        r"full\[.*1 of 1 arrivals, 4608 bytes missing",
    ),
    Mutant("expect forgotten", "tile.expect(ring, turn, row, rows)", "pass", Deadlock, r"0 of 1 arrivals, -\d+ bytes"),
    Mutant("expect for the next turn", "expect(ring, turn, row", "expect(ring, turn + 1, row", KernelError, "empty"),
    Mutant("tokens into the next slot", "load_tokens(ring, turn", "load_tokens(ring, turn + 1", KernelError, "empty"),
    Mutant(
        "weights into the next slot", "load_weights(ring, turn", "load_weights(ring, turn + 1", KernelError, "empty"
    ),
    Mutant("tokens forgotten", TOKENS, "pass", Deadlock, "2048 bytes miss"),
    Mutant(
        "tokens twice",
        "tile.load_weights",
        TOKENS + "; tile.load_weights",
        KernelError,
        "2048 bytes more than expected",
    ),
    Mutant("tokens of the next step", "x_gmem, token, step)", "x_gmem, token, step + 1)", *WRONG),
    Mutant("weights from the first step", "w_gmem, row, step, rows", "w_gmem, row, first, rows", *WRONG),
    Mutant("weights with another pitch", "step, rows, k_blocks)", "step, rows, k_blocks - 1)", *WRONG),
    Mutant("weights beyond the last", "w_gmem, row, step", "w_gmem, row, step + steps", KernelError, "not among the"),
    Mutant(
        "multiplies the previous slot",
        "wgmma_sp(acc, ring, turn, step + 1)",
        "wgmma_sp(acc, ring, turn - 1, step + 1)",
        KernelError,
        "while the wgmma group of turn 0 reads",
    ),
    Mutant(
        "multiplies the next slot",
        "wgmma_sp(acc, ring, turn,",
        "wgmma_sp(acc, ring, turn + 1,",
        KernelError,
        "waited until it was full",
    ),
    Mutant("last wait_wgmma dropped", FINAL_WAIT, "", KernelError, "releases slot .* while the wgmma group"),
    Mutant("last wait weaker", "tile.wait_wgmma()", "tile.wait_wgmma_but_one()", KernelError, "while the wgmma group"),
    Mutant(
        "sums stored in flight",
        FINAL_WAIT + "tile.release(ring, turn - 1)",
        "pass",
        KernelError,
        r"touches sums in flight",
    ),
    Mutant("sums that nobody has begun", "turn, step)", "turn, step + 2)", AssertionError, "nan"),
    Mutant("sums of the last piece kept", "turn, step)", "turn, step + 2 * index)", *WRONG),
    Mutant("sums begun in each step", "turn, step)", "turn, 0)", *WRONG),
    Mutant(
        "one set of metadata", "turn, step + 1)", "turn, step + 2)", KernelError, "overwrites metadata that the wgmma"
    ),
    Mutant("partial sums not added", "if last < steps", "if False", *WRONG),
    Mutant(
        "partial sums not stored",
        "tile.store_partial(acc, partial_gmem, flag_gmem)",
        "pass",
        Deadlock,
        r"consumer . of CTA 0 waits for partial sums 2, part 1 of 3",
    ),
    Mutant("a part stored as the whole", "cluster == 1 and first > 0", "False", Deadlock, "waits for partial sums"),
    Mutant("the whole stored as a part", "first > 0", "first >= 0", KernelError, "nobody has added"),
    Mutant("pieces counted without the split", "pieces(tiles, split,", "pieces(tiles, 0,", AssertionError, "nan"),
    Mutant("producer: other pieces", PIECE, PIECE.replace("split, ", "min(split, 0), "), Deadlock, "waits for turn"),
    Mutant(
        "consumer: one step less", PIECE, PIECE + "; last -= first == 0", KernelError, "CTA of this launch", last=True
    ),
    Mutant(
        "consumer: another tile", PLACE, PLACE.replace("row, token", "token, row"), AssertionError, "nan", last=True
    ),
    Mutant(
        "producer: another tile",
        PLACE,
        PLACE.replace("row_tiles, token_tiles", "token_tiles, row_tiles"),
        AssertionError,
        "nan",
    ),
    Mutant("producer's turn stands still", "turn += 1", "pass", KernelError, "after its phase is complete"),
    Mutant("every tile stored twice", STORE, STORE + "; " + STORE, KernelError, "again"),
    Mutant("Y with another pitch", STORE, STORE.replace("pitch", "rows"), AssertionError, "nan"),
    Mutant("a row too many", STORE, STORE.replace("rows", "rows + 1"), AssertionError, "wrote outside of Y"),
    Mutant("a token too many", STORE, STORE.replace("tokens,", "tokens + 1,"), AssertionError, "wrote outside of Y"),
    Mutant(
        "a consumer loads",
        "tile.wait_full(ring, turn)",
        TOKENS,
        KernelError,
        "consumer . of CTA .: load_tokens is a word for the producer",
    ),
    Mutant(
        "the producer multiplies",
        "tile.wait_empty(ring, turn)",
        "tile.wgmma_sp(None, ring, turn, False)",
        KernelError,
        "producer of CTA .: wgmma_sp is a word for a consumer",
    ),
    Mutant("cluster: sums not added", REDUCE, "pass", *WRONG, case=CLUSTER),
    Mutant("cluster: added twice", REDUCE, REDUCE + "; " + REDUCE, *WRONG, case=CLUSTER),
    Mutant(
        "cluster: all outputs stored", STORE, STORE.replace("cluster", "1"), KernelError, "belongs to one", case=CLUSTER
    ),
    Mutant("cluster: another size", REDUCE, REDUCE.replace("cluster)", "3)"), KernelError, "as launched", case=CLUSTER),
    Mutant(
        "cluster: sums sent while they are added to",
        FINAL_WAIT + "tile.release(ring, turn - 1)",
        "pass",
        KernelError,
        "reduce_scatter touches sums in flight",
        case=CLUSTER,
    ),
    Mutant(
        "cluster: sums sent over a slot that is not released",
        "tile.release(ring, turn - 1)\n                if",
        "pass\n                if",
        KernelError,
        "writes sums over the ring",
        case=CLUSTER,
    ),
    Mutant(
        "cluster: the producer goes on",
        "in range(pieces):",
        "in range(2 * pieces):",
        KernelError,
        "sums over the ring|where sums of other CTAs are",
        case=CLUSTER,
    ),
    Mutant("half of the weights not loaded", FILL, FILL.replace("rows", "64"), AssertionError, "nan"),
]


@pytest.mark.parametrize("case", [CASE, CLUSTER], ids=["cta", "cluster"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_text_itself_passes(case, seed):
    replace(case, make_kernel=maker_of(text_of(make_gemm), "make_gemm")).run(seed)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_is_found(mutant):
    make_kernel = mutated(mutant, make_gemm)
    for seed in SEEDS:
        with pytest.raises(mutant.kind, match=mutant.says):
            replace(mutant.case or CASE, make_kernel=make_kernel).run(seed)


def reversed_metadata(blocks):
    return metadata_registers(blocks)[..., ::-1, :]


def shifted_lanes(blocks):
    return np.roll(metadata_registers(blocks), 1, axis=-1)


metadata_registers = words.metadata_registers


@pytest.mark.parametrize(
    ("word", "wrong"),
    [
        ("metadata_registers", reversed_metadata),
        ("metadata_registers", shifted_lanes),
        ("swizzle_128b", lambda row, chunk: chunk + 0 * row),
    ],
    ids=["metadata of the other k32", "metadata of other lanes", "no swizzle"],
)
def test_a_wrong_layout_is_found(monkeypatch, word, wrong):
    monkeypatch.setattr(words, word, wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        CASE.run()


def test_lanes_that_the_hardware_does_not_read_do_not_matter(monkeypatch):
    def noise_elsewhere(blocks):
        registers = metadata_registers(blocks).copy()
        registers[..., 2::4] = registers[..., 3::4] = 0xDEADBEEF
        return registers

    monkeypatch.setattr(words, "metadata_registers", noise_elsewhere)
    CASE.run()


def test_too_few_arrivals_let_the_producer_overtake(monkeypatch):
    """``empty`` counts all consumers; with half of them the slot is refilled while others read it."""
    init = barrier.Barrier.init
    monkeypatch.setattr(barrier.Barrier, "init", lambda self, count: init(self, max(count // 2, 1)))
    for seed in SEEDS:
        with pytest.raises(KernelError, match=r"before consumer .* has released it|too many arrivals|twice"):
            CASE.run(seed)


def test_a_barrier_is_initialised_first():
    for use in (lambda b: b.arrive("producer"), lambda b: b.copy(16, None), lambda b: b.passed(0)):
        with pytest.raises(KernelError, match=r"before mbarrier\.init"):
            use(barrier.Barrier("full[0]"))
