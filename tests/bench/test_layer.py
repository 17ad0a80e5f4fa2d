"""`bench layer` from end to end on the host, with small layers; and its bars on made-up rows."""

from __future__ import annotations

import json

import pytest

from nmsparse.errors import UnsupportedDeviceError

torch = pytest.importorskip("torch", reason="the benchmark runs on torch")
pytest.importorskip("transformers", reason="it builds the layers")

from nmsparse.bench import layer  # noqa: E402
from nmsparse.bench.gpu import Timed  # noqa: E402
from nmsparse.bench.layer import measure, stacks  # noqa: E402
from nmsparse.bench.layer.measure import WRONG, replay_error  # noqa: E402
from nmsparse.bench.layer.stacks import LAYERS, Case, Contender, Past, Shape  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says when it is imported is not ours

PATTERNS = ("2:4", "samoyeds:1:2:128")
COMMON = {"hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXTRAL = Shape("small mixtral", "MixtralConfig", {**COMMON, "num_experts_per_tok": 2, "num_local_experts": 3}, 2)
QWEN3 = {**COMMON, "num_experts_per_tok": 2, "num_experts": 3, "moe_intermediate_size": 128, "head_dim": 32}
CASES = (Case("prefill", 2, 5, 0), Case("decode 3", 3, 1, 16))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its idle threads spin on the cores that our kernels want
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [MIXTRAL, Shape("small qwen3", "Qwen3MoeConfig", QWEN3, 3)], ids=lambda s: s.name)
def test_a_layer_is_checked_and_timed(shape):
    memory, *rows = layer.measure_layer(shape, PATTERNS, CASES, "cpu", torch.float32)
    assert not memory["failed"] and memory["bytes"]["dense"] == 4 * 3 * 3 * 128 * 256
    assert 1.7 < memory["smaller"]["2:4"] < 2 and 3.4 < memory["smaller"]["samoyeds:1:2:128"] < 4
    assert [row["name"] for row in rows] == ["prefill", "decode 3"]
    for row in rows:
        assert {"eager", "grouped_mm", "batched_mm", *PATTERNS} <= set(row["seconds"]) == set(row["error"])
        assert max(row["error"].values()) < 1e-5
        assert row["best"] not in PATTERNS and set(row["over"]) == set(PATTERNS)
        assert row["over"]["2:4"] == row["seconds"][row["best"]] / row["seconds"]["2:4"]
        assert f"best dense: {row['best']}" in layer.line(row)
    assert len(layer.bars([memory, *rows])) == 3
    json.dumps([memory, *rows], allow_nan=False)


@torch.no_grad()
def test_wrong_contenders_are_named_and_not_timed():
    model, made, _, _ = stacks.contenders(MIXTRAL, (), "cpu", torch.float32)
    eager = made["eager"]

    class Lazy(torch.nn.Module):
        """A layer whose experts do nothing."""

        def forward(self, x, **options):
            return x + eager.layers[0].self_attn(eager.layers[0].input_layernorm(x), **options)[0]

    class Broken(torch.nn.Module):
        def forward(self, x, **options):
            raise RuntimeError("no kernel\nfor this")

    for name, wrong in (("lazy", Lazy()), ("broken", Broken())):
        wrong.mlp = eager.layers[0].mlp
        made[name] = Contender(model.config, [wrong] * 2, "eager", eager)
    row = {}
    measure(CASES[1], model, made, row)
    assert "relative error" in row["failed"]["lazy"] and row["failed"]["broken"] == "RuntimeError: no kernel"
    assert {"eager", "grouped_mm"} <= set(row["seconds"]) and not {"lazy", "broken"} & set(row["seconds"])


@torch.no_grad()
def test_the_past_is_a_cache():
    """A token after a prefill through :class:`Past` is the last token of the prefill one longer."""
    model = stacks.build(MIXTRAL, "cpu", torch.float32)
    contender = Contender(model.config, list(model.layers), "eager")
    x = torch.randn(2, 6, 256)

    class Keep:
        def update(self, keys, values, *_):
            self.keys, self.values = keys, values
            return keys, values

    kept, past = Keep(), Past(model.config, Case("", 2, 1, 6), x)
    want = contender(x, model.rotary_emb(x, torch.arange(6)[None]), [kept])[:, -1:]
    past.keys[:, :, :-1], past.values[:, :, :-1] = kept.keys[:, :, :-1], kept.values[:, :, :-1]
    got = contender(x[:, -1:], model.rotary_emb(x, torch.arange(5, 6)[None]), [past])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_bars_and_what_was_not_measured(capsys):
    case = {"what": "case", "model": "m", "name": "prefill", "best": "grouped_mm"}
    rows = [
        {"what": "memory", "model": "m", "smaller": {"samoyeds:1:2:128": 3.3}},
        {**case, "over": {"samoyeds:1:2:128": 1.6, "2:4": 1.1}},
        {**case, "over": {"2:4": 1.1}},
    ]
    assert [(row["value"], row["holds"]) for row in layer.bars(rows)] == [(3.3, False), (1.6, True)]
    assert "not measured" in capsys.readouterr().out
    row = {"past": 16, "how": {"a": "as it runs"}, "left_out": {"b": "too much"}, "failed": {"c": "broke"}}
    row = layer.line({**case, **row, "seconds": {"a": 2e-6}, "over": {}})
    assert "a 2.0 (as it runs);" in row and "b: too much;" in row and "c: broke;" in row


def test_the_published_shapes():
    """Parameters of the experts of a layer: 45.1 billion of Mixtral's 32 layers, 29 of Qwen3's 48."""
    for shape, billions, layers in zip(LAYERS, (45.1, 29.0), (32, 48), strict=True):
        assert len(stacks.build(shape, "meta", torch.bfloat16).layers) == 1
        held = stacks.build(shape, "meta", torch.bfloat16).layers[0].mlp.experts.parameters()
        assert round(layers * sum(p.numel() for p in held) * 1e-9, 1) == billions


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_wants_a_gpu():
    with pytest.raises(UnsupportedDeviceError, match="bench layer"):
        layer.run(None)


@pytest.mark.parametrize("works", [True, False])
def test_a_replay_is_compared_on_other_inputs_which_are_put_back(works):
    inputs = [torch.ones(2, 3), torch.full((2, 3), 2.0)]
    runs = [lambda x=x: 3 * x for x in inputs]
    results = [run() for run in runs]
    graph = Timed(lambda: [r.copy_(run()) for r, run in zip(results, runs, strict=True)] if works else None, 2)
    error = replay_error(graph, results, runs, inputs, [torch.randn(2, 3) for _ in inputs])
    assert error == 0 if works else error > WRONG
    assert inputs[0].eq(1).all() and inputs[1].eq(2).all()
