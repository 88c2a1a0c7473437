#!/usr/bin/env bash
# torch 2.13.0: float32 moments of bfloat16 parameters through state_dict and load_state_dict.
#
# Guess: an optimizer's state comes back from its own state_dict as it was.
# Seen:  state_dict gives float32 moments; load_state_dict casts them to the parameter's type, so that 1.001 comes back as 1.0
#        and stays bfloat16 from then on. Steps go on without a word; `step` alone keeps its type. A run that was saved and
#        one that was not part at the next step.
# Here:  masters and moments are at least float32, and a checkpoint holds each under a key of its own, loaded as it was
#        (moetrain/train/optimizer.py).
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import sys

import torch


def adamw():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    return weight, torch.optim.AdamW([weight])


weight, optimizer = adamw()
weight.grad = torch.ones_like(weight)
optimizer.step()
for name in ("exp_avg", "exp_avg_sq"):  # as stochastic rounding or a wrapper would keep them
    optimizer.state[weight][name] = torch.full((4,), 1.001)
saved = optimizer.state_dict()
other_weight, other = adamw()
other.load_state_dict(saved)
before, after = saved["state"][0]["exp_avg"], other.state[other_weight]["exp_avg"]
step = other.state[other_weight]["step"]
print(f"saved: {before.dtype} {before[0].item():.4f}", f"loaded: {after.dtype} {after[0].item():.4f}", sep="\n")
print(f"step: {step.dtype}", "guess: loaded is torch.float32 1.0010", sep="\n")
right = before.dtype == torch.float32 and after.dtype == torch.bfloat16 and after[0].item() == 1.0
sys.exit(0 if right and step.dtype == torch.float32 else 1)
PYTHON
verdict "$python" "$folder/show.py"
