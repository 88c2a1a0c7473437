#!/usr/bin/env bash
# transformers 5.24.0: the loss of a MoE model that is given num_items_in_batch, as its Trainer does.
#
# Guess: a batch cut into micro-batches gives the same sum of losses; that is what num_items_in_batch is for.
# Seen:  it is so for the cross-entropy alone. The balance loss is added whole in each micro-batch: in eight of them it
#        weighs eight times as much.
# Here:  benchmarks/hf_step.py divides it itself, by the micro-batch's share of tokens, so that both loops compute the
#        same; moetrain weighs balance losses by tokens.
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0 transformers==5.24.0
cat >"$folder/show.py" <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, output_router_logits=True,
    router_aux_loss_coef=1.0,
)
model = AutoModelForCausalLM.from_config(config)
token_ids = torch.randint(0, 64, (8, 8))
num_targets = token_ids.numel() - len(token_ids)
cross_entropy, balance = [], []
for micro_batches in (1, 2, 4, 8):
    parts = [model(part, labels=part, num_items_in_batch=num_targets) for part in token_ids.chunk(micro_batches)]
    aux = sum(part.aux_loss.item() for part in parts)
    cross_entropy.append(sum(part.loss.item() for part in parts) - aux)
    balance.append(aux)
    print(f"{micro_batches} micro-batches: cross-entropy {cross_entropy[-1]:.3f}, balance {aux:.3f}")
print("guess: all rows alike")
same = max(cross_entropy) - min(cross_entropy) < 1e-3
grows = all(abs(loss / balance[0] / parts - 1) < 0.05 for loss, parts in zip(balance, (1, 2, 4, 8), strict=True))
raise SystemExit(not (same and grows))
PYTHON
verdict "$python" "$folder/show.py"
