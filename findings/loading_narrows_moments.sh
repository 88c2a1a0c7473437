#!/usr/bin/env bash
# torch 2.13.0: float32 moments of bfloat16 parameters through state_dict and load_state_dict.
#
# Guess: an optimizer's state comes back from its own state_dict as it was.
# Seen:  state_dict gives float32 moments; load_state_dict casts them to the parameter's type, so that 1.001 comes back
#        as 1.0, and steps go on in bfloat16 without a word; `step` alone keeps its type. torch's own AdamW makes no such
#        moments and refuses to step with them; an optimizer derived from it that keeps them loses their digits at every
#        resume.
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
for name in ("exp_avg", "exp_avg_sq"):  # as a derived optimizer would keep them
    optimizer.state[weight][name] = torch.full((4,), 1.001)
saved = optimizer.state_dict()
try:
    optimizer.step()
    refused = False
except RuntimeError as error:
    refused = True
    print(f"AdamW with them: {error}")
other_weight, other = adamw()
other.load_state_dict(saved)
before, after = saved["state"][0]["exp_avg"], other.state[other_weight]["exp_avg"]
loaded, value = after.dtype, after[0].item()
other_weight.grad = torch.ones_like(other_weight)
other.step()
later, step = other.state[other_weight]["exp_avg"].dtype, other.state[other_weight]["step"].dtype
print(f"saved: {before.dtype} {before[0].item():.4f}", f"loaded: {loaded} {value:.4f}", sep="\n")
print(f"after a step: {later}; of step itself: {step}", "guess: loaded is torch.float32 1.0010", sep="\n")
right = before.dtype == torch.float32 and loaded == torch.bfloat16 and value == 1.0
sys.exit(0 if refused and right and later == torch.bfloat16 and step == torch.float32 else 1)
PYTHON
verdict "$python" "$folder/show.py"
