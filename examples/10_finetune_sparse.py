"""Fine-tune a real MoE language model into a sparsity pattern: masks that follow the weights, then stand still.

Pruning tiny-moe in one shot costs it a third of a bit per byte. Training with masks gets most of that back: here for as
long as a CPU allows, on a GPU for three minutes.

Run:  python examples/10_finetune_sparse.py [PATTERN]
"""

import copy
import math
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from nmsparse.torch import sparsify_
from nmsparse.torch.train import MaskTraining

PATTERN = sys.argv[1] if len(sys.argv) > 1 else "2:4"
TINY = Path(__file__).parent / "tiny-moe"
GPU = torch.cuda.is_available()
DEVICE, SECONDS, BATCH, LENGTH, RATE = ("cuda", 180, 128, 512, 2e-3) if GPU else ("cpu", 20, 4, 128, 5e-4)

torch.manual_seed(0)
torch.set_num_threads(1)  # on a CPU its idle threads spin on the cores that ours want
held_out = (TINY / "heldout.txt").read_bytes()
# What the model was trained on: the standard library, without the modules that are held out.
modules = (path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
text = b"\0".join(module for module in modules if module[:2000] not in held_out)


def tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int64)).to(DEVICE)


training_text, windows = tensor(text), tensor(held_out[: 8 * 512]).view(8, 512)


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module) -> float:
    logits = model(windows).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item() / math.log(2)


model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).to(DEVICE)
dense_bits = bits_per_byte(model)
one_shot_bits = bits_per_byte(sparsify_(copy.deepcopy(model), PATTERN))

# Dense weights are trained, masked ones compute. For the last 40 % of the time the masks stand still.
optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
masks = MaskTraining(model, PATTERN, steps=1, decay=2e-4, frozen=0.4)
began, steps = time.monotonic(), 0
while (share := (time.monotonic() - began) / SECONDS) < 1:
    start = torch.randint(0, len(training_text) - LENGTH, (BATCH, 1), device=DEVICE)
    tokens = training_text[start + torch.arange(LENGTH, device=DEVICE)]
    for group in optimizer.param_groups:
        group["lr"] = RATE * min(1, steps / 5) * (1 + math.cos(math.pi * share)) / 2
    with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU):
        loss = model(tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    masks.step(share)
    steps += 1
masks.finish()

# The weights are in the pattern now: packing them loses nothing.
masked_bits = bits_per_byte(model)
weights = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
sparsify_(model, PATTERN)
trained_bits = bits_per_byte(model.to(torch.bfloat16) if GPU else model)
stored = sum(m.nbytes for m in model.modules() if type(m).__name__ == "SparseWeight")
print(f"{PATTERN}: dense {dense_bits:.3f} bits/byte, one shot {one_shot_bits:.3f}, trained {trained_bits:.3f}")
print(f"{steps} steps in {SECONDS} s; experts {weights:,} -> {stored:,} bytes")
assert abs(trained_bits - masked_bits) < (0.01 if GPU else 1e-3)
assert trained_bits < one_shot_bits
