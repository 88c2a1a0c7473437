#!/usr/bin/env bash
# torch 2.13.0, CPU: adding the experts' rows of a token to its output in bfloat16.
#
# Guess: index_add_ and scatter_add_ are two spellings of one sum and round alike; sum and cumsum, which keep more digits
#        meanwhile, show that torch takes care.
# Seen:  a thousand ones are 1000 by scatter_add_, sum and cumsum, but 256 by index_add_, which rounds to bfloat16 after every
#        addition: 256 + 1 is 256 there. A token with K experts, or a gradient of a much used row, loses its small parts.
# Here:  rows are added in float32 and rounded once (moetrain/ops/scatter_add_rows.py).
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import sys

import torch

ones = torch.ones(1000, dtype=torch.bfloat16)
place = torch.zeros(1000, dtype=torch.int64)
zero = torch.zeros(1, dtype=torch.bfloat16)
seen = {
    "sum": ones.sum().item(),
    "cumsum": ones.cumsum(0)[-1].item(),
    "scatter_add_": zero.clone().scatter_add_(0, place, ones).item(),
    "index_add_": zero.clone().index_add_(0, place, ones).item(),
}
print("\n".join(f"{name}: {value}" for name, value in seen.items()), "guess: 1000 each", sep="\n")
sys.exit(0 if list(seen.values()) == [1000, 1000, 1000, 256] else 1)
PYTHON
verdict "$python" "$folder/show.py"
