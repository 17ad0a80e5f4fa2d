"""Mistakes planted in the texts of Samoyeds and of the grouped product: the twin finds each, and says what is wrong."""

from __future__ import annotations

from dataclasses import replace

import grouped_cases
import numpy as np
import pytest
from gemm_cases import SamoyedsCase
from grouped_cases import GroupedCase
from mutants import Mutant, maker_of, mutated, text_of

from nmsparse.cuda.config import GemmConfig
from nmsparse.cuda.config_grouped import GroupedConfig
from nmsparse.cuda.tile.cpu import Deadlock, KernelError

# Five whole tiles and one in three parts, which begin at steps 0, 3 and 6 of three runs of four steps.
PAIRS = GemmConfig(pairs=True, tile_t=16, stages=2)
SAMOYEDS = SamoyedsCase(PAIRS, rows=304, tokens=40, k=640, workers=3, split=1, parts=3, guard=0, v=256)
# Two row tiles, of which the second has one block; experts with two tiles, none, and one, the last one not full.
GATED = GroupedConfig(pairs=True, gather=True, gated=True, activation="silu", tile_t=16, stages=2)
GROUPED = GroupedCase(GATED, (20, 0, 5, 15), outputs=160, k=320, workers=2, guard=0)
IN_ORDER = replace(GROUPED, cfg=replace(GATED, gather=False))
# Tiles of 64 tokens; the last one of an expert has 6, 40 and 32.
LARGE = replace(GROUPED, cfg=replace(GATED, tile_t=64), counts=(70, 0, 40, 96), k=256)
DENSE = replace(GROUPED, cfg=replace(GATED, pairs=False, dense=True, gather=False))
PADDED = replace(GROUPED, k=200)
GUARDED = replace(GROUPED, guard=8)
ONE_CTA = replace(GROUPED, workers=1)
SEEDS = range(2)
WRONG = AssertionError, "Not equal to tolerance"
NAN = AssertionError, "nan"

PICK = "following = tile.pick(picks, min(run + 1, runs - 1))"
FIRST = "odd = tile.pick(picks, min(run, runs - 1))"
RELEASE = "tile.release(ring, turn)"
END = "left == 0 and step <"
ADD = "tile.end_run(acc, odd, following)"
LAST = "tile.end_runs(acc, odd)"

RUNS = [
    ("a part begins with the first run", "tile.run_of(first, run_steps)", "tile.run_of(0, run_steps)", *WRONG),
    ("the run of the next step", "tile.run_of(first, run_steps)", "tile.run_of(first + 1, run_steps)", *WRONG),
]


# What both texts say about runs, at their depth.
def common(depth, before, case):
    indent = " " * depth
    deep = replace(case, cfg=replace(case.cfg, stages=5), v=case.cfg.tile_k)  # a run is a step
    wait = f"tile.wait_wgmma()\n{indent}"
    return [
        ("run ended a step late", END, "left < 0 and step <", *WRONG),
        ("run ended a step early", END, "left == 1 and step <", *WRONG),
        ("run ended only after a tile", END, "False and step <", *WRONG),
        ("runs not counted", "following, run + 1, run_steps", "following, run, run_steps", *WRONG),
        ("steps of a run not counted anew", "following, run + 1, run_steps", "following, run + 1, left", *WRONG),
        ("the owner of a run forgotten", "odd, run, left = following,", "odd, run, left = odd,", *WRONG),
        ("sums begun in each step", f"turn, {before})", "turn, 0)", *WRONG),
        ("sums undefined at first", f"turn, {before})", "turn, 1)", *NAN),
        ("picks of the same run", PICK, PICK.replace("run + 1", "run"), *WRONG),
        (
            "picks beyond the last run",
            PICK,
            "following = tile.pick(picks, run + 1)",
            KernelError,
            "reads the picks of run 3: expected one of 3 runs",
        ),
        (
            "picks without the padding's",
            PICK,
            PICK.replace("min(run + 1, runs - 1)", "run + runs"),
            KernelError,
            "reads the picks of run",
        ),
        ("rows of a thread exchanged", ADD, "tile.end_run(acc, odd[::-1], following[::-1])", *WRONG),
        ("owners exchanged", ADD, "tile.end_run(acc, following, odd)", *WRONG),
        ("run ended twice", ADD, f"{ADD}; {ADD}", *WRONG),
        ("the last run not ended", LAST, "pass", *WRONG),
        ("the last run ended twice", LAST, f"{LAST}; {LAST}", *WRONG),
        ("run ended in flight", wait + RELEASE, "pass", KernelError, "end_run touches sums in flight", deep),
        ("zero forgotten", "tile.zero(acc)", "pass", *NAN),
        ("wait dropped", wait, "", KernelError, "while the wgmma group of turn 0 reads"),
        ("released before the wait", wait + RELEASE, f"{RELEASE}; {wait}", KernelError, "while the wgmma group"),
        ("never released", RELEASE, "pass", Deadlock, r"producer of CTA . waits for turn 2: parity 0 of empty\[0\]"),
        ("released twice", RELEASE, f"{RELEASE}; {RELEASE}", KernelError, "but has released 1 so far"),
        ("wait_full dropped", "tile.wait_full(ring, turn)", "pass", KernelError, "waited until it was full"),
        ("wait_empty dropped", "tile.wait_empty(ring, turn)", "pass", KernelError, "waited until it was empty"),
        ("the producer's turn stands still", "turn += 1", "pass", KernelError, "after its phase is complete|twice"),
    ]


OF_SAMOYEDS = [
    ("picks of another tile", "tile.picks(picks_gmem, row,", "tile.picks(picks_gmem, 1 - row,", *WRONG),
    ("picks below the last", "picks_gmem, row, rows,", "picks_gmem, row, rows + 2,", KernelError, "sub-row 152: there"),
    ("a part begins with the owner of the first run", FIRST, FIRST.replace("min(run, runs - 1)", "0"), *WRONG),
    ("a part goes on with the owner of the second run", PICK, PICK.replace("run + 1", "1"), *WRONG),
    ("zero for the first piece only", "tile.zero(acc)", "if index == 0: tile.zero(acc)", *WRONG),
    ("partial sums not added", "if last < steps", "if False", *WRONG),
    ("a part stored as the whole", "cluster == 1 and first > 0", "False", Deadlock, "waits for partial sums"),
    (
        "one block too few",
        "tile.expect(ring, turn, row, rows)",
        "tile.expect(ring, turn, row, 256)",
        KernelError,
        "bytes",
    ),
]
STORE = "tile.store(acc, ring, y_gmem, row, first, end, outputs, y_pitch)"
WEIGHTS = "tile.load_weights(ring, turn, w_gmem, expert, row, step, row_blocks, k_blocks)"
TOKENS = "tile.load_tokens(ring, turn, x_gmem, tokens, step, columns)"
FIND = "tile.find_tokens(tokens, rows_gmem, first, end, x_pitch)"
PLACE = "tile.place(tile.nth(index), row_tiles, plan_gmem, experts)"
MINE = f"{PLACE}\n                picks"  # of the consumers
LOOP = "range(tile.share(tiles))"
AWAIT = "tile.await_previous()"
EARLY = KernelError, "touches global memory, which the previous launch may; say await_previous"
OF_GROUPED = [
    ("the previous launch not awaited", AWAIT, "pass", *EARLY),
    ("the previous launch awaited by one role", AWAIT, f"if tile.role() == 0: {AWAIT}", *EARLY),
    ("the plan read too early", AWAIT, f"tile.tiles(plan_gmem, experts, 1); {AWAIT}", *EARLY),
    ("weights of one expert", "w_gmem, expert,", "w_gmem, 0,", *WRONG),
    ("weights of the next expert", "w_gmem, expert,", "w_gmem, expert + 1,", KernelError, "not among the"),
    ("weights of another row tile", WEIGHTS, WEIGHTS.replace("row,", "0,"), *WRONG),
    ("weights with another pitch", WEIGHTS, WEIGHTS.replace("row_blocks", "row_blocks - 1"), *NAN),
    ("picks of one expert", "picks_gmem, expert,", "picks_gmem, 0,", *WRONG),
    ("the first run has the owner of the second", "odd = tile.pick(picks, 0)", "odd = tile.pick(picks, 1)", *WRONG),
    ("picks of the first tile", "expert, row, rows, runs", "expert, 0, rows, runs", *WRONG),
    ("few tokens of every tile", "end - first <= FEW", "True", AssertionError, "nan|Not equal", LARGE),
    ("few tokens of a fuller tile", "<= FEW", "<= FEW + 8", AssertionError, "nan|Not equal", LARGE),
    ("the turn of few forgotten", "turn = few(", "few(", KernelError, "wait_full first|released", LARGE),
    ("a token too many", STORE, STORE.replace("end", "end + 1"), KernelError, "again"),
    ("a token too few", STORE, STORE.replace("end", "end - 1"), *NAN),
    ("the end of all", STORE, STORE.replace("end", "10**6"), KernelError, "again"),
    ("tokens stored one further", STORE, STORE.replace("first", "first + 1"), AssertionError, "nan"),
    ("tiles stored as rows lie", STORE, STORE.replace("row,", "0,"), KernelError, "again"),
    ("outputs too many", STORE, STORE.replace("outputs", "outputs + 8"), AssertionError, "outside of Y", GUARDED),
    ("Y with another pitch", STORE, STORE.replace("y_pitch", "outputs"), AssertionError, "nan", GUARDED),
    ("every tile stored twice", STORE, f"{STORE}; {STORE}", KernelError, "again"),
    ("tokens not found", FIND, "pass", KernelError, "has not found; say find_tokens first"),
    ("tokens of the first tile", FIND, f"if index == 0: {FIND}", *WRONG),
    ("tokens up to one less", FIND, FIND.replace("end", "end - 1"), *WRONG),
    ("tokens up to one more", FIND, FIND.replace("end", "end + 1"), KernelError, "are not in rows_gmem"),
    ("rows of X with another pitch", FIND, FIND.replace("x_pitch", "columns"), *WRONG),
    ("tokens of another expert", FIND, FIND.replace("first", "0"), *WRONG),
    ("tokens of another expert, in order", FIND, FIND.replace("first", "0"), *WRONG, IN_ORDER),
    ("tokens never brought", TOKENS, "pass", Deadlock, "1 of 129 arrivals, 0 bytes missing"),
    ("tokens never brought, in order", TOKENS, "pass", Deadlock, "1 of 1 arrivals, 2048 bytes missing", IN_ORDER),
    ("tokens twice", TOKENS, f"{TOKENS}; {TOKENS}", KernelError, "after its phase is complete"),
    ("tokens twice, in order", TOKENS, f"{TOKENS}; {TOKENS}", KernelError, "after its phase is complete", IN_ORDER),
    ("tokens of the next step", "tokens, step,", "tokens, step + 1,", *WRONG),
    ("columns that X does not have", "step, columns", "step, columns + 8", *NAN, PADDED),
    ("weights never brought", WEIGHTS, "pass", Deadlock, "128 of 129 arrivals"),
    ("weights twice", WEIGHTS, f"{WEIGHTS}; {WEIGHTS}", KernelError, "arrives twice"),
    ("weights of one step", "expert, row, step,", "expert, row, 0,", *WRONG),
    ("dense weights of one step", "expert, row, step,", "expert, row, 0,", *WRONG, DENSE),
    ("dense weights of one expert", "w_gmem, expert,", "w_gmem, 0,", *WRONG, DENSE),
    ("dense weights of another tile", "expert, row, step,", "expert, row + 1, step,", *WRONG, DENSE),
    ("too few tiles", "plan_gmem, experts, row_tiles)", "plan_gmem, experts, 1)", *NAN),
    (
        "too many tiles",
        "plan_gmem, experts, row_tiles)",
        "plan_gmem, experts, row_tiles + 1)",
        KernelError,
        "no expert",
    ),
    ("a tile too many brought", LOOP, "range(tile.share(tiles) + 1)", KernelError, "belongs to no expert"),
    ("a step too many brought", "range(steps)", "range(steps + 1)", Deadlock, "producer of CTA 0 waits for turn 26"),
    ("the consumers' tiles backwards", MINE, MINE.replace("tile.nth(index)", "tiles - 1 - tile.nth(index)"), *WRONG),
    (
        "the consumers' tiles without the other CTAs'",
        MINE,
        MINE.replace("tile.nth(index)", "tile.nth(index) // 2"),
        KernelError,
        "again",
    ),
]


def mutants():
    for case, lists in (
        (SAMOYEDS, (RUNS, common(20, "step - first", SAMOYEDS), OF_SAMOYEDS)),
        (GROUPED, (common(12, "step", GROUPED), OF_GROUPED)),
    ):
        for name, old, new, kind, says, *other in (row for rows in lists for row in rows):
            mutant = Mutant(name, old, new, kind, says, *(other or [case]))
            yield pytest.param(mutant, id=f"{case.make_kernel.__name__[5:]}: {name}")


@pytest.mark.parametrize("case", [SAMOYEDS, GROUPED, LARGE, IN_ORDER, DENSE, PADDED, GUARDED, ONE_CTA])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_text_itself_passes(case, seed):
    text = text_of(case.make_kernel)
    replace(case, make_kernel=maker_of(text, case.make_kernel.__name__)).run(seed)


@pytest.mark.parametrize("mutant", list(mutants()))
def test_a_mistake_is_found(mutant):
    make_kernel = mutated(mutant, mutant.case.make_kernel)
    for seed in SEEDS:
        with pytest.raises(mutant.kind, match=mutant.says):
            replace(mutant.case, make_kernel=make_kernel).run(seed)


@pytest.mark.parametrize(
    ("fillers", "says"), [(1, "more bytes|128 of"), (128, "too many|more bytes"), (130, "129 of 130")]
)
def test_a_wrong_number_of_arrivals_is_found(monkeypatch, fillers, says):
    """Of a gather, each of the producer's 128 threads arrives, and one announces the bytes of the weights."""
    monkeypatch.setattr(GroupedConfig, "fillers", property(lambda cfg: fillers))
    with pytest.raises(KernelError, match=says):
        GROUPED.run()


@pytest.mark.parametrize(
    "case", [GROUPED, replace(IN_ORDER, cfg=replace(IN_ORDER.cfg, pairs=False))], ids=["1:2", "2:4"]
)
def test_gate_and_up_rows_that_lie_otherwise_are_found(monkeypatch, case):
    monkeypatch.setattr(grouped_cases, "interleaved", lambda rows: np.arange(rows))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        case.run()
