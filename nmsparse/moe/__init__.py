"""Mixture-of-Experts layers with structured-sparse experts: routing, experts, and the layer of both."""

from __future__ import annotations

from .experts import SparseExperts
from .layer import MoELayer
from .router import Router, route

__all__ = ["MoELayer", "Router", "SparseExperts", "route"]
