"""What training into a pattern gives back: tiny-moe on one GPU, against the clock, beside a narrower dense model.

The dense model has experts of as many bytes as the Samoyeds ones, and is trained from random weights for as long as
tiny-moe was, plus the time of the recovery. ``docs/torch.md`` explains the training.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedDeviceError, require
from ...formats.pattern import parse
from .. import bar
from ..gpu import attempt
from .text import standard_library

if TYPE_CHECKING:
    from .train import Recipe, Trained

__all__ = ["add_arguments", "bars", "narrower", "recover", "run"]

SAMOYEDS = "samoyeds:1:2:128"
NARROWER = "narrower"
RUNS = ("2:4", SAMOYEDS, NARROWER)
PROMISED = {"2:4": 1.035, SAMOYEDS: 1.10}  # bits per byte of the held-out text, median of the seeds
FROM_SCRATCH = (210 + 180) / 180  # a narrower model trains as long as tiny-moe and its recovery of 180 s together
FADE = {"nm": 0.0, "vnm": 0.4, "samoyeds": 0.4}  # where most weights go, they go slowly
POINTS = 12  # of a curve
SAME = 1e-3  # bits per byte: kernels against the masked dense model
Rows = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m nmsparse bench recovery`` alone."""
    group = parser.add_argument_group("of the suite recovery")
    group.add_argument("--model", type=Path, metavar="DIR", help="default: examples/tiny-moe of the repository")
    group.add_argument("--train", type=Path, metavar="FILE", help="text; default: this Python's standard library")
    group.add_argument(
        "--runs", nargs="*", default=RUNS, metavar="RUN", help=f"patterns, or {NARROWER}; default: {' '.join(RUNS)}"
    )
    group.add_argument(
        "--seeds", nargs="+", type=int, default=(0, 1, 2), metavar="N", help="accuracy too; default: 0 1 2"
    )
    group.add_argument("--seconds", type=float, default=180, metavar="S", help="of training (default: 180)")
    group.add_argument("--rate", type=float, default=2e-3, help="largest learning rate (default: 2e-3)")
    group.add_argument("--decay", type=float, default=2e-4, help="lambda of SR-STE (default: 2e-4)")
    group.add_argument(
        "--with",
        dest="others",
        nargs="+",
        type=Path,
        default=(),
        metavar="FILE",
        help="accuracy too: what --json wrote elsewhere; those runs count as well",
    )
    group.add_argument("--no-compile", dest="compiled", action="store_false", help="run the training step eagerly")


def run(args: argparse.Namespace, device: str = "cuda") -> Rows:
    """Trains and evaluates; prints each run as a line of JSON, then the bars over these and other runs."""
    others = [row for path in args.others for row in json.loads(path.read_text())["results"]["recovery"]]
    rows = [row for row in others if row["what"] == "run"]
    if args.runs:
        rows += train_all(args, device)
    return [*rows, *bars(rows)]


def train_all(args: argparse.Namespace, device: str) -> Rows:
    """The rows of all runs that ``args`` asks for."""
    torch, np = require("torch", "torch"), require("numpy", "torch")
    require("transformers", "torch")
    if not torch.cuda.is_available() and device == "cuda":
        raise UnsupportedDeviceError("bench recovery: expected an NVIDIA GPU that torch can use, found none")
    from ...demo import MODEL
    from .train import Recipe, bits

    folder = args.model or MODEL
    heldout = (folder / "heldout.txt").read_bytes()
    texts = args.train.read_bytes() if args.train else standard_library(heldout), heldout
    text, held = (torch.from_numpy(np.frombuffer(t, np.uint8).copy()).to(device) for t in texts)
    recipe = Recipe(rate=args.rate, decay=args.decay)
    rows: Rows = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    add({"what": "dense", "bits": bits(rounded_(load(folder, device)), held), "training bytes": len(text)})
    failed: dict[str, str] = {}
    for seed in args.seeds:
        for name in args.runs:
            act = narrower if name == NARROWER else recover
            attempt(failed, f"{name}, seed {seed}", lambda act=act, name=name, seed=seed: add(
                act(name, folder, text, held, recipe, args.seconds, seed, args.compiled)))  # fmt: skip
    return [*rows, *([{"what": "failed", "failed": failed}] if failed else [])]


def recover(
    name: str, folder: Path, text: Any, held: Any, recipe: Recipe, seconds: float, seed: int, compiled: bool
) -> dict[str, Any]:
    """One run into the pattern ``name``."""
    torch = require("torch", "torch")
    from ...torch import SparseWeight, sparsify_
    from ...torch.train import MaskTraining
    from .train import bits, train

    torch.manual_seed(seed)
    model, recipe = load(folder, text.device), recipe._replace(fade=FADE[parse(name).format])
    masks = MaskTraining(
        model, name, steps=1, decay=recipe.decay, fade=recipe.fade, refresh=recipe.refresh, frozen=recipe.frozen
    )
    trained = train(
        model, text, held, recipe, seconds, seed=seed, compiled=compiled, masks=masks, every=seconds / POINTS
    )
    masks.finish()
    row = _row(name, seed, bits(rounded_(model), held), trained, recipe)
    sparsify_(model, name)  # loses nothing: the weights are in the pattern
    row["bits by kernels"] = bits(model, held)
    row["experts nbytes"] = sum(module.nbytes for module in model.modules() if isinstance(module, SparseWeight))
    return row


def narrower(
    name: str, folder: Path, text: Any, held: Any, recipe: Recipe, seconds: float, seed: int, compiled: bool
) -> dict[str, Any]:
    """One run of a dense model whose experts take as many bytes as Samoyeds ones, rounded up to 8 neurons."""
    torch, transformers = require("torch", "torch"), require("transformers", "torch")
    from ...torch import SparseWeight
    from .step import IMPLEMENTATION
    from .train import bits, train

    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(folder)
    width = config.intermediate_size
    shapes = [(config.num_local_experts, *s) for s in ((2 * width, config.hidden_size), (config.hidden_size, width))]
    sparse = sum(SparseWeight(SAMOYEDS, shape, dtype=torch.bfloat16, device="meta").nbytes for shape in shapes)
    config.intermediate_size = math.ceil(width * sparse / sum(2 * math.prod(shape) for shape in shapes) / 8) * 8
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(text.device)
    model.set_experts_implementation(IMPLEMENTATION)
    seconds *= FROM_SCRATCH
    trained = train(model, text, held, recipe, seconds, seed=seed, compiled=compiled, every=seconds / POINTS)
    row = _row(name, seed, bits(rounded_(model), held), trained, recipe)
    row["width"] = config.intermediate_size
    row["experts nbytes"] = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    return row


def _row(name: str, seed: int, found: float, trained: Trained, recipe: Recipe) -> dict[str, Any]:
    row = {"what": "run", "run": name, "seed": seed, "bits": found}
    return {**row, **trained._asdict(), "recipe": recipe._asdict()}


def load(folder: Path, device: Any) -> Any:
    """tiny-moe in float32, on experts that compile."""
    torch, transformers = require("torch", "torch"), require("transformers", "torch")
    from .step import IMPLEMENTATION

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    model.set_experts_implementation(IMPLEMENTATION)
    return model


def rounded_(model: Any) -> Any:
    """The parameters in bfloat16, as they are stored; the rotary frequencies stay what they are."""
    torch = require("torch", "torch")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def bars(rows: Rows) -> Rows:
    """The promises, from the runs there are; what was not run is said, and is no row."""
    runs = [row for row in rows if row["what"] == "run"]
    median = {name: statistics.median(r["bits"] for r in runs if r["run"] == name) for name in {r["run"] for r in runs}}
    found: Rows = []
    for name, bound in PROMISED.items():
        if name in median:
            found.append(bar(f"{name}: bits per byte, median of the seeds", median[name], bound, at_least=False))
    if {SAMOYEDS, NARROWER} <= median.keys():
        found.append(bar("Samoyeds - narrower dense, bits per byte", median[SAMOYEDS] - median[NARROWER], 0,
                         at_least=False))  # fmt: skip
    apart = [abs(row["bits by kernels"] - row["bits"]) for row in runs if "bits by kernels" in row]
    if apart:
        found.append(bar("kernels - masked dense model, largest, bits per byte", max(apart), SAME, at_least=False))
    for name in {*RUNS} - median.keys():
        print(f"{name}: not run")
    return found
