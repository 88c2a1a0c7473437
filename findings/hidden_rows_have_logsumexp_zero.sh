#!/usr/bin/env bash
# torch 2.13.0, CPU: the log-sum-exp of a query that may see no key.
#
# Guess: an empty sum: the output is 0 and its logarithm minus infinity, so that parts of attention over several blocks of
#        keys merge by their log-sum-exps, as ring attention does.
# Seen:  aten._scaled_dot_product_flash_attention_for_cpu gives output 0 and log-sum-exp 0, as if one key of score 0 had been
#        seen. Merged with another part of log-sum-exp L, the output shrinks by 1 / (1 + exp(-L)): half of it at L = 0.
# Here:  attention over blocks has kernels of its own (csrc/cpu/attention), in which what sees nothing counts nothing.
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import sys

import torch

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
mask = torch.zeros(8, 8)
mask[3] = float("-inf")
first, first_lse = attend(q, k, v, 0.0, False, attn_mask=mask)
second, second_lse = attend(q, k, v, 0.0, False)
print(f"output: at most {first[:, :, 3].abs().max().item()}", f"log-sum-exp: {first_lse[0, :, 3].tolist()}", sep="\n")
total = torch.logaddexp(first_lse, second_lse)
merged = first * (first_lse - total).exp()[..., None] + second * (second_lse - total).exp()[..., None]
share = (merged[:, :, 3] / second[:, :, 3]).flatten()
print(f"of the other part's output there are left: {share.min().item():.3f} to {share.max().item():.3f}")
print("guess: -inf, and all of it")
right = bool((first[:, :, 3] == 0).all() and (first_lse[:, :, 3] == 0).all()) and share.max().item() < 0.99
sys.exit(0 if right else 1)
PYTHON
verdict "$python" "$folder/show.py"
