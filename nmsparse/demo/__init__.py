"""``python -m nmsparse demo``: a real Mixture-of-Experts language model on structured-sparse experts, without torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NMSparseError, require

if TYPE_CHECKING:
    import numpy as np

    from .measure import Result
    from .mixtral import Mixtral

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-moe"
PICTURE = Path("out") / "demo.png"
PATTERNS = ("2:4", "vnm:64:2:8", "samoyeds:1:2:128")
LENGTH = 512  # bytes in a window, as the model was trained
WINDOWS = 300


def run(
    model_dir: str | Path = MODEL,
    text: str | Path | None = None,
    windows: int | None = WINDOWS,
    patterns: Sequence[str] = PATTERNS,
    png: str | Path | None = None,
    progress: bool = False,
) -> list[Result]:
    """Run held-out text through a checkpoint, dense and with pruned experts; print the table and return its rows.

    ``model_dir`` holds a byte-level Mixtral checkpoint in safetensors. ``text`` is a file to predict (None: its
    ``heldout.txt``), cut into windows of 512 bytes, of which the first ``windows`` are used (None: all). ``png`` names
    a picture to write. ``progress`` shows a bar on stderr.

    Raises NMSparseError or OSError for input that is missing or does not fit, ImportError for a missing extra.
    """
    from ..formats.pattern import parse
    from .measure import measure, steps
    from .table import format_note, format_table

    chosen = [parse(pattern) for pattern in patterns]
    if png is not None:
        require("matplotlib", "bench")  # before the work, not after it
    model_dir = Path(model_dir)
    model = load_model(model_dir)
    tokens = read_windows(model_dir / "heldout.txt" if text is None else Path(text), windows)
    print(f"{model.describe()}\n{len(tokens)} windows of {LENGTH} bytes of held-out text\n", flush=True)
    with _bar(steps(len(tokens), len(chosen)), progress) as advance:
        results = measure(model, tokens, chosen, advance)
    print(format_table(results), format_note(), sep="\n\n")
    if png is not None:
        from .. import array
        from .picture import draw

        weight = model.experts[0].gate_up[0]
        draw(png, results, weight, {str(pattern): array(weight, pattern).mask() for pattern in chosen})
        print(f"\npicture: {png}")
    return results


def load_model(model_dir: Path) -> Mixtral:
    """The checkpoint in ``model_dir``; an NMSparseError that says where to get one if there is none."""
    from ..io import Checkpoint
    from .mixtral import load

    config = model_dir / "config.json"
    if not config.exists():
        raise NMSparseError(
            f"{model_dir} holds no model (no config.json): the demo needs the folder examples/tiny-moe of the nmsparse "
            "repository; run it from a checkout, or name a Mixtral checkpoint with --model DIR"
        )
    try:
        parsed = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NMSparseError(f"{config} is not JSON: {error}") from None
    return load(parsed, Checkpoint(model_dir).__getitem__)


def read_windows(path: Path, windows: int | None) -> np.ndarray:
    """The first ``windows`` (None: all) whole windows of a file, (N, 512) uint8."""
    import numpy as np

    if not path.exists():
        raise NMSparseError(f"{path} is missing: name a text to predict with --text FILE")
    text = np.fromfile(path, dtype=np.uint8)
    available = len(text) // LENGTH
    if available == 0 or (windows is not None and not 1 <= windows <= available):
        raise NMSparseError(
            f"--windows: {path} has {available} whole windows of {LENGTH} bytes, expected at least {windows or 1}; "
            "ask for fewer, or name a longer text with --text FILE"
        )
    return text[: (windows or available) * LENGTH].reshape(-1, LENGTH)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    option = parser.add_argument
    option("--model", type=Path, default=MODEL, metavar="DIR", help="checkpoint (default: examples/tiny-moe)")
    option("--text", type=Path, metavar="FILE", help="text to predict (default: heldout.txt of the model)")
    option("--windows", type=_count, default=WINDOWS, metavar="N|all", help=f"of {LENGTH} bytes (default: {WINDOWS})")
    option("--patterns", nargs="+", default=PATTERNS, metavar="PATTERN", help=f"default: {' '.join(PATTERNS)}")
    option("--png", type=Path, default=PICTURE, metavar="FILE", help=f"picture to write (default: {PICTURE})")
    option("--no-png", dest="png", action="store_const", const=None, help="write no picture")


def main(args: argparse.Namespace) -> int:
    """Run the command and return 0; ``python -m nmsparse`` turns what bad input raises into a message and code 2."""
    run(args.model, args.text, args.windows, args.patterns, args.png, progress=sys.stderr.isatty())
    return 0


def _count(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number or 'all', got {text!r}")
    return int(text)


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """A function to call before each step with its name; it moves a progress bar if one is ``shown``."""
    if not shown:
        yield lambda _: None
        return
    with require("tqdm", "hf").tqdm(total=total, unit="batch", leave=False) as bar:
        started = False

        def advance(name: str) -> None:
            nonlocal started
            bar.update(started)  # what ended is the step before
            started = True
            bar.set_description(f"{name:16}", refresh=True)

        yield advance
