"""HEAPr: what the loss rises by when one neuron of one expert goes."""

from __future__ import annotations

import numpy as np

from .checks import per_token, statistic


def heapr(activation_squares: np.ndarray, gradient_squares: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The score of each neuron (an atomic expert) of each expert, float64 (…, I); the lowest are pruned first.

    ``activation_squares`` (…, I) is Σ h² over the tokens of the expert, h being what the down projection reads;
    ``gradient_squares`` (…, I) is Σ (∂loss/∂h)² over the same tokens; ``count`` (…) is their number. The leading axes
    are any, as (layers, experts). An expert without tokens scores 0, so it goes first.

    The score of the paper is ``mean over tokens of ½ e_kᵀ Ḡ e_k``: e_k = h_k · down[:, k] is the output of the neuron
    and Ḡ the mean of g gᵀ, g = ∂loss/∂(output of the expert), which stands for the Hessian as in Optimal Brain
    Surgeon. Since ``down[:, k]ᵀ g`` is ∂loss/∂h_k, that equals ``½ · mean(h_k²) · mean((∂loss/∂h_k)²)``: one forward
    and one backward pass and two sums for each neuron, where the paper's second pass needs Ḡ (H, H) for each expert.

    The gradients are those of each token's loss, or of any constant multiple of it: only the ranking counts.
    The means are over the tokens of the expert, as published. ``heapr(…) * count[..., None]`` is the expected rise of
    the total loss instead, in which a neuron that few tokens reach matters less: the order within an expert is the
    same, the one across experts (:func:`tile_widths`) is better where experts are unequally busy.

    Li et al., "HEAPr: Hessian-based Efficient Atomic Expert Pruning in Output Space", ICLR'26, arXiv:2509.22299.

    >>> heapr(np.array([[8.0, 2.0]]), np.array([[2.0, 2.0]]), np.array([2]))
    array([[2. , 0.5]])
    """
    h = statistic("activation_squares", activation_squares)
    g = statistic("gradient_squares", gradient_squares, shape=h.shape)
    count = statistic("count", count, shape=h.shape[:-1])[..., None]
    return per_token(h, count) * per_token(g, count) / 2
