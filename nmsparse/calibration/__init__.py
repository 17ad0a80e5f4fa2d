"""Running a model over a little text, to learn what pruning needs to know of it, and pruning it with that.

:class:`LayerRecord` is what is learnt of one layer, a :class:`Walk` takes the text through the layers,
:func:`prune_layers` prunes them on the way. ``walk.MixtralWalk`` runs the NumPy Mixtral, ``huggingface.ModelWalk`` any
Mixture-of-Experts model of ``transformers``.
"""

from __future__ import annotations

from .pipeline import ExpertReport, PrunedLayer, prune_layers, try_patterns
from .record import Batch, LayerRecord
from .walk import MixtralWalk, Walk, survey

__all__ = [
    "Batch",
    "ExpertReport",
    "LayerRecord",
    "MixtralWalk",
    "PrunedLayer",
    "Walk",
    "prune_layers",
    "survey",
    "try_patterns",
]
