"""The table of the demo, in 100 columns of plain text, and how to read it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from .measure import BATCH, Result

WIDTH = 100

_WIDTHS = (-17, 6, 11, 6, 8, 8, 8, 8, 8, 8)  # negative: to the left
_HEADER = (
    ("", "stored", "expert", "of", "bits per", "experts", "experts", "model", "model", "error of"),
    ("pattern", "%", "bytes", "dense", "byte", "µs/token", "speed-up", "µs/token", "speed-up", "logits"),
)

NOTE = """\
The weights were pruned in one shot, by magnitude, with no recovery afterwards: the bits per byte show what that
costs, not what a pattern can do. So small a model collapses when only 25 % of its expert weights stay, whatever the
pattern; what fine-tuning under the mask would win back is not shown here. What the table does show is the formats:
their bytes (values, metadata and indices, against the experts as the checkpoint stores them), their speed (dense is
NumPy's BLAS on experts widened to float32 beforehand; all models took turns on the same batches of {batch} windows,
medians), and that the sparse kernels compute what the pruned weights say (error: the largest difference from the
logits of the same pruned weights as dense float32 arrays, over the largest logit).\
"""


def format_table(results: Sequence[Result]) -> str:
    """Rows for ``results``, of which the first is the dense model."""
    dense = results[0]
    lines = [*map(_line, _HEADER), "-" * WIDTH]
    for r in results:
        lines.append(
            _line(
                (
                    r.pattern,
                    f"{100 * r.density:.1f}",
                    f"{r.total_bytes:,}",
                    f"{100 * r.total_bytes / dense.total_bytes:.0f} %",
                    f"{r.bits:.4f}",
                    f"{1e6 * r.expert_time:.2f}",
                    f"{dense.expert_time / r.expert_time:.2f}×",
                    f"{1e6 * r.model_time:.2f}",
                    f"{dense.model_time / r.model_time:.2f}×",
                    "-" if r.error is None else f"{r.error:.1e}",
                )
            )
        )
    lines += [
        f"{r.pattern}: not in its error, windows where two experts of a token tied within rounding: {r.ties}"
        for r in results
        if r.ties
    ]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return " ".join(f"{c:<{-w}}" if w < 0 else f"{c:>{w}}" for c, w in zip(cells, _WIDTHS, strict=True)).rstrip()


def format_note() -> str:
    """The paragraph below the table."""
    return textwrap.fill(NOTE.format(batch=BATCH).replace("\n", " "), WIDTH)
