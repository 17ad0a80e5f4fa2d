"""Calibration records against their definitions, and the pipeline on tiny-moe."""

from __future__ import annotations

import numpy as np
import pytest

from nmsparse import NMSparseError, SparseExperts, demo, prune
from nmsparse.calibration import Batch, LayerRecord, MixtralWalk, prune_layers, try_patterns
from nmsparse.calibration.choices import allocate_patterns, ordered, strongest
from nmsparse.calibration.evaluate import evaluate, with_layers
from nmsparse.calibration.record import hidden, hidden_moments
from nmsparse.prune.experts import easy_ep, take_neurons
from nmsparse.reference import ACTIVATIONS

EXPERTS, HIDDEN, WIDTH, TOKENS = 3, 16, 32, 40


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    gate_up = rng.standard_normal((EXPERTS, 2 * WIDTH, HIDDEN))
    down = rng.standard_normal((EXPERTS, HIDDEN, WIDTH))
    ids = np.stack([rng.permutation(EXPERTS)[:2] for _ in range(TOKENS)])
    x, before = rng.standard_normal((2, TOKENS, HIDDEN))
    return gate_up, down, Batch(x, ids, rng.random((TOKENS, 2)), before)


def test_a_record_is_its_definition(layer):
    gate_up, down, batch = layer
    record = LayerRecord(gate_up, down)
    half = TOKENS // 2
    for part in (slice(0, half), slice(half, None)):  # batches add up
        record.add(Batch(*(a[part] for a in batch)))
    act, tiny = ACTIVATIONS["silu"], 1e-6
    norms = np.zeros((TOKENS, 2))
    moved = np.zeros((TOKENS, HIDDEN))
    for e in range(EXPERTS):
        slots = [(t, k) for t, k in np.ndindex(TOKENS, 2) if batch.ids[t, k] == e]
        totals = {name: 0.0 for name in ("abs_gate", "abs_h", "h_squares", "x_squares", "row_squares", "largest")}
        x_hessian = h_hessian = 0.0
        for t, k in slots:
            x, g = batch.x[t], batch.weights[t, k]
            a = gate_up[e] @ x

            def h_of(a):
                return act(a[:WIDTH]) * a[WIDTH:]

            h = h_of(a)
            y = down[e] @ h
            norms[t, k] = np.linalg.norm(y)
            moved[t] += g * y
            totals["abs_gate"] += np.abs(act(a[:WIDTH]))
            totals["abs_h"] += np.abs(h)
            totals["h_squares"] += h**2
            totals["x_squares"] += x**2
            totals["largest"] = max(totals["largest"], np.abs(y).max())
            slopes = [down[e] @ (h_of(a + step) - h_of(a - step)) / (2 * tiny) for step in tiny * np.eye(2 * WIDTH)]
            totals["row_squares"] += g**2 * np.square(slopes).sum(axis=1)
            x_hessian += np.outer(x, x)
            h_hessian += g**2 * np.outer(h, h)
        for name, total in totals.items():
            np.testing.assert_allclose(getattr(record, name)[e], total, rtol=1e-3, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(record.x_hessian[e], x_hessian)
        np.testing.assert_allclose(record.h_hessian[e], h_hessian)
        mine = batch.ids == e
        assert record.count[e] == len(slots)
        assert record.gates[e] == pytest.approx(batch.weights[mine].sum())
        assert record.norms[e] == pytest.approx(norms[mine].sum())
        assert record.norm_squares[e] == pytest.approx((norms[mine] ** 2).sum())
        assert record.gated_norms[e] == pytest.approx((norms * batch.weights)[mine].sum())
        for other in range(EXPERTS):
            both = [row for row in batch.ids if e in row and other in row]
            assert record.together[e, other] == len(both)
    expected = easy_ep(batch.ids, batch.weights, norms, batch.before, batch.before + moved, EXPERTS)
    np.testing.assert_allclose(record.turns, expected)
    assert record.stream == pytest.approx((batch.before**2).sum())


def test_hidden_moments_are_their_definition(layer):
    gate_up, _, batch = layer
    fewer = gate_up[:, [0, 3, 5, WIDTH, WIDTH + 3, WIDTH + 5]]
    hessian, cross = hidden_moments([batch], gate_up, fewer)
    for e in range(EXPERTS):
        x, g = batch.of(e)
        new, old = g * hidden(x, fewer[e], 3), g * hidden(x, gate_up[e], WIDTH)
        np.testing.assert_allclose(hessian[e], new.T @ new)
        np.testing.assert_allclose(cross[e], old.T @ new)
        np.testing.assert_allclose(new, old[:, [0, 3, 5]])


@pytest.mark.parametrize("order", [ordered("2:4", "wanda"), ordered("samoyeds:1:2:8", "magnitude"), strongest(1.0)])
def test_a_new_order_of_neurons_changes_no_output(layer, order):
    gate_up, down, batch = layer
    record = LayerRecord(gate_up, down)
    record.add(batch)
    orders = np.stack([order(record, e) for e in range(EXPERTS)])
    assert (np.sort(orders) == np.arange(WIDTH)).all()
    moved = SparseExperts(*take_neurons((gate_up, down), orders))
    expected = SparseExperts(gate_up, down)(batch.x, batch.ids, batch.weights)
    np.testing.assert_allclose(moved(batch.x, batch.ids, batch.weights), expected, rtol=1e-12, atol=1e-12)


class OneLayer:
    """A walk of one layer that keeps what it is given."""

    def __init__(self, gate_up, down, batches):
        self.weights, self.inputs = (gate_up, down), batches

    def __len__(self):
        return 1

    def experts(self, layer):
        return SparseExperts(*self.weights)

    def batches(self, layer):
        return iter(self.inputs)

    def replace(self, layer, gate_up, down):
        self.replaced = gate_up, down


@pytest.fixture
def walk(layer):
    gate_up, down, _ = layer
    rng = np.random.default_rng(1)
    ids = np.tile([[0, 1]], (100, 1))  # expert 2 sees nothing
    gate_up, down = np.float64(np.float32(gate_up)), np.float64(np.float32(down))  # the walk's weights are float32
    inputs = [Batch(rng.standard_normal((100, HIDDEN)), ids, rng.random((100, 2))) for _ in range(2)]
    return OneLayer(gate_up, down, inputs)


def test_losses_of_the_report_are_those_of_the_outputs(walk):
    (layer,) = prune_layers(walk, "2:4", "sparsegpt")
    for e, report in enumerate(layer.reports[:2]):
        x, g = (np.vstack(parts) for parts in zip(*(batch.of(e) for batch in walk.inputs), strict=True))
        gate_up, down = (w[e] for w in walk.weights)
        y = g * hidden(x, gate_up, WIDTH) @ down.T
        pruned = g * hidden(x, layer.gate_up[e].todense(), WIDTH) @ layer.down[e].todense().T
        assert report.down_loss == pytest.approx(((y - pruned) ** 2).sum() / (y**2).sum(), rel=1e-3)
        assert report.stream_loss == pytest.approx(((y - pruned) ** 2).sum() / 400, rel=1e-3)  # no stream: per token
        assert report.tokens == 200 and report.density == 0.5


def test_an_expert_without_tokens_falls_back_and_says_so(walk):
    (layer,) = prune_layers(walk, "2:4", "admm")
    assert [report.few for report in layer.reports] == [False, False, True]
    down = walk.weights[1][2]
    np.testing.assert_array_equal(layer.down[2].todense(), prune.apply(down, "2:4"))
    assert not np.array_equal(layer.down[0].mask(), prune.mask(walk.weights[1][0], "2:4"))


def test_few_tokens_do_not_change_what_magnitude_keeps(walk):
    walk.inputs = [Batch(*(a[:20] for a in walk.inputs[0][:3]))]
    (layer,) = prune_layers(walk, "2:4", "magnitude")
    assert all(report.few for report in layer.reports)
    for pruned, w in zip([*layer.gate_up, *layer.down], [*walk.weights[0], *walk.weights[1]], strict=True):
        np.testing.assert_array_equal(pruned.mask(), prune.mask(w, "2:4"))


def test_experts_without_a_gate_are_refused(walk):
    walk.weights = walk.weights[0][:, :WIDTH], walk.weights[1]
    with pytest.raises(NMSparseError, match="with a gate"):
        prune_layers(walk, "2:4", "magnitude")


def test_neurons_are_dropped_before_pruning_and_the_rest_makes_up_for_them(walk):
    (few,) = prune_layers(walk, "dense", "admm", neurons=lambda record, e: np.arange(0, WIDTH, 2))
    assert few.gate_up[0].shape == (WIDTH, HIDDEN) and few.down[0].shape == (HIDDEN, WIDTH // 2)
    assert few.reports[0].density == 0.5 and 0 < few.reports[0].down_loss < 1
    (half,) = prune_layers(walk, "2:4", "admm", neurons=lambda record, e: np.arange(0, WIDTH, 2))
    assert half.reports[0].density == 0.25 and few.reports[0].down_loss < half.reports[0].down_loss < 1


def test_patterns_for_each_expert(walk):
    (layer,) = prune_layers(walk, [["dense", "2:4", "1:4"]], "admm")
    assert [report.density for report in layer.reports] == [1.0, 0.5, 0.25]
    np.testing.assert_array_equal(layer.down[0], walk.weights[1][0])
    with pytest.raises(NMSparseError, match="one for each of 3 experts in 1 layers"):
        prune_layers(walk, [["2:4"]], "admm")


def test_a_dropped_expert_writes_nothing_and_takes_no_bytes(walk):
    (layer,) = prune_layers(walk, [["2:4", "drop", "2:4"]], "admm")
    assert layer.gate_up[1] is None and layer.down[1] is None
    assert (layer.reports[1].nbytes, layer.reports[1].density, layer.reports[1].down_loss) == (0, 0, 1)
    assert not walk.replaced[1][1].any() and walk.replaced[1][0].any()
    with pytest.raises(NMSparseError, match="one expert of layer 0 at least"):
        prune_layers(walk, [["drop"] * 3], "admm")


def test_trying_patterns_changes_nothing_and_allocation_meets_the_budget(walk):
    patterns = ("dense", "2:4", "1:4")
    tried = try_patterns(walk, patterns, "admm")
    np.testing.assert_allclose(walk.replaced[0], walk.weights[0], rtol=1e-6)
    assert [tried[p][0][0].stream_loss for p in range(3)] == sorted(tried[p][0][0].stream_loss for p in range(3))
    budget = sum(report.nbytes for report in tried[1][0])
    (chosen,) = allocate_patterns(tried, patterns, budget)
    assert sum(tried[patterns.index(name)][0][e].nbytes for e, name in enumerate(chosen)) <= budget
    assert chosen[2] == "1:4"  # nobody takes it, so it loses nothing
    guarded = np.array([[False, False, True]])
    assert allocate_patterns(tried, patterns, 1.1 * budget, guard=guarded)[0] == ["1:4", "1:4", "dense"]
    everything = sum(report.nbytes for report in tried[0][0])
    assert allocate_patterns(tried[:2], patterns[:2], everything)[0][:2] == ["dense", "dense"]


needs_model = pytest.mark.skipif(not demo.MODEL.exists(), reason="needs examples/tiny-moe of a checkout")


@needs_model
def test_the_walk_is_the_model():
    """With the dense experts put back, the stream that leaves the walk gives the model's own logits."""
    from nmsparse.demo.mixtral import rms_norm

    model = demo.load_model(demo.MODEL)
    windows = demo.read_windows(demo.MODEL / "calibration.txt", 2)
    walk = MixtralWalk(model, windows, step=1)
    for layer in range(len(walk)):
        batches = list(walk.batches(layer))
        experts = walk.experts(layer)
        walk.replace(layer, experts.gate_up, experts.down)
        assert len(batches) == 2
    logits = rms_norm(walk.stream, model.norm, model.config.rms_norm_eps) @ model.head.T
    np.testing.assert_allclose(logits, model(windows), atol=2e-3)


@needs_model
def test_calibrated_2_4_loses_less_than_half_of_magnitude():
    model = demo.load_model(demo.MODEL)
    text = demo.read_windows(demo.MODEL / "calibration.txt", None)[::100]
    heldout = demo.read_windows(demo.MODEL / "heldout.txt", None)[::200]
    dense = evaluate(model, heldout)
    loss = {
        method: evaluate(with_layers(model, prune_layers(MixtralWalk(model, text), "2:4", method)), heldout) - dense
        for method in ("magnitude", "sparsegpt")
    }
    assert 0 < loss["sparsegpt"] < loss["magnitude"] / 2


@needs_model
def test_calibration_and_heldout_text_share_no_line_of_code():
    """Long lines only: everybody writes `else:`. Headers and licences that many files share are left out by hand."""
    texts = [(demo.MODEL / name).read_bytes() for name in ("calibration.txt", "heldout.txt")]
    ours, theirs = ({line for line in text.split(b"\n") if len(line) > 60} for text in texts)
    shared = ours & theirs
    assert len(shared) < 0.02 * len(ours)
