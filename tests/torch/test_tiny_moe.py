"""A real language model through transformers with our experts: as good as with the pruned weights in dense form."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from nmsparse.io import convert
from nmsparse.torch import densify_, from_pretrained, sparsify_

TINY = Path(__file__).parents[2] / "examples" / "tiny-moe"
LENGTH = 512


def windows(count):
    text = np.fromfile(TINY / "heldout.txt", np.uint8)[: count * LENGTH]
    return torch.from_numpy(text.reshape(count, LENGTH).astype(np.int64))


@torch.no_grad()
def bits_per_byte(model, tokens):
    logits = model(tokens).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item() / math.log(2)


@pytest.mark.parametrize("pattern", ["2:4", "samoyeds:1:2:128"])
def test_bits_per_byte_and_generate(tmp_path, pattern):
    convert(TINY, tmp_path / "sparse", pattern)
    sparse = from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    dense = densify_(copy.deepcopy(sparse))
    dense.set_experts_implementation("eager")
    tokens = windows(4)
    got, want = bits_per_byte(sparse, tokens), bits_per_byte(dense, tokens)
    assert 1 < want < 8 and abs(got - want) < 1e-3
    options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    prompt = torch.tensor([list(b"    def __init__(self, "), list(b"import os\nimport sys\n\nd")])
    assert torch.equal(sparse.generate(prompt, **options), dense.generate(prompt, **options))


def test_what_it_costs_to_prune():
    """One-shot 2:4 is worse than the dense model, and by no more than the README of the model says."""
    model, tokens = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), windows(4)
    dense = bits_per_byte(model, tokens)
    pruned = bits_per_byte(sparsify_(model, "2:4"), tokens)
    assert dense + 0.05 < pruned < dense + 0.8
