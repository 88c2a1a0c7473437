#!/usr/bin/env bash
# transformers 5.24.0 over torch 2.13.0: experts of any width.
#
# Guess: a model of any moe_intermediate_size runs, or from_config refuses it; where the fast path cannot, another does.
# Seen:  the default way of running experts (grouped_mm) raises in the first forward pass where a row of a weight matrix
#        is no multiple of 16 bytes, and nothing falls back: bf16 with width 20, fp32 with width 21. The same model runs
#        with set_experts_implementation("eager").
# Here:  our kernels take any width. benchmarks/foreign_experts.py and benchmarks/hf_step.py name the way that they
#        compare with.
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0 transformers==5.24.0
cat >"$folder/show.py" <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig


def runs(width, dtype, implementation):
    """Whether a forward pass works, and else what it says."""
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    try:
        model(torch.randint(0, 64, (2, 8)))
    except RuntimeError as error:
        return str(error)
    return "runs"


refused = "strides should be multiple of 16 bytes"
right = True
for width, dtype, expected in (
    (16, torch.bfloat16, "runs"),
    (20, torch.bfloat16, refused),
    (20, torch.float32, "runs"),
    (21, torch.float32, refused),
):
    seen = runs(width, dtype, None), runs(width, dtype, "eager")
    print(f"width {width}, {dtype}: by default {seen[0]!r}, eager {seen[1]!r}")
    right &= seen == (expected, "runs")
print("guess: all run")
raise SystemExit(not right)
PYTHON
verdict "$python" "$folder/show.py"
