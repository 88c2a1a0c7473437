#!/usr/bin/env bash
# transformers 5.24.0: load_balancing_loss_func (Mixtral, Qwen3-MoE and others), which models add to the loss.
#
# Guess: a loss over several layers is large where any layer is collapsed.
# Seen:  loads and probabilities are averaged over the layers first, and multiplied then. Four layers, of which each
#        sends every token to two experts of its own, look perfectly balanced; and perfect balance is top_k, not 1.
# Here:  moetrain sums a loss of each layer that is 1 at perfect balance (moetrain/moe/balance/), so that coefficients
#        do not carry over.
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0 transformers==5.24.0
cat >"$folder/show.py" <<'PYTHON'
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as of_mixtral
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as of_qwen3

TOKENS, EXPERTS, TOP_K, LAYERS = 64, 8, 2, 4


def collapsed(layer):
    """Router logits of a layer that sends all tokens to two experts."""
    logits = torch.full((TOKENS, EXPERTS), -20.0)
    logits[:, 2 * layer : 2 * layer + 2] = 20.0
    return logits


even = tuple(torch.zeros(TOKENS, EXPERTS) for _ in range(LAYERS))
one_pair = tuple(collapsed(0) for _ in range(LAYERS))
own_pairs = tuple(collapsed(layer) for layer in range(LAYERS))
right = True
for name, loss in (("Mixtral", of_mixtral), ("Qwen3-MoE", of_qwen3)):
    seen = [round(loss(logits, EXPERTS, TOP_K).item(), 3) for logits in (even, one_pair, own_pairs)]
    print(f"{name}: even {seen[0]}; four layers collapsed on one pair {seen[1]}, each on a pair of its own {seen[2]}")
    right &= seen == [2.0, 8.0, 2.0]
print("guess: the last is as large as the one before")
raise SystemExit(not right)
PYTHON
verdict "$python" "$folder/show.py"
