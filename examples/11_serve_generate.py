"""Serve a Hugging Face MoE model with sparse experts: convert it once, load it sparse, generate.

Run:  python examples/11_serve_generate.py [PATTERN]
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from nmsparse.io import convert
from nmsparse.torch import densify_, from_pretrained

PATTERN = sys.argv[1] if len(sys.argv) > 1 else "6:8"  # a pattern that tiny-moe survives without training
TINY = Path(__file__).parent / "tiny-moe"
DEVICE = "cuda" if torch.cuda.is_available() and PATTERN == "2:4" else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
if DEVICE == "cpu":
    torch.set_num_threads(1)  # its idle threads spin on the cores that ours want

with tempfile.TemporaryDirectory() as folder:
    convert(TINY, Path(folder) / "sparse", PATTERN)  # or: python -m nmsparse convert IN OUT --pattern …
    # The two lines: the experts are read as sparse buffers; their dense form never exists.
    model = from_pretrained(Path(folder) / "sparse", dtype=DTYPE).to(DEVICE)
print(model.model.layers[0].mlp.experts)

prompt = "import os\nimport sys\n\n\nclass "
tokens = torch.tensor([list(prompt.encode())], device=DEVICE)
options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
start = time.perf_counter()
out = model.generate(tokens, **options)
seconds = time.perf_counter() - start
print(bytes(out[0].tolist()).decode("utf-8", "replace"))
print(f"\n{out.shape[1] - tokens.shape[1]} tokens in {seconds:.1f} s on {DEVICE}")

# The pattern is all that changes the model: the same weights in dense form say the same, token for token.
if DEVICE == "cpu":
    assert torch.equal(out, densify_(model).generate(tokens, **options))
dense = AutoModelForCausalLM.from_pretrained(TINY, dtype=DTYPE).to(DEVICE).generate(tokens, **options)
same = int((out == dense[:, : out.shape[1]]).int().cumprod(1).sum()) - tokens.shape[1]
print(f"the model before pruning agrees for the first {same} tokens")
assert out.shape[1] > tokens.shape[1]
