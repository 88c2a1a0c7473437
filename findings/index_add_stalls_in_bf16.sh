#!/usr/bin/env bash
# torch 2.13.0, CPU: sums in bfloat16 over a one-dimensional index_add_, and the gradients that are made by it.
#
# Guess: index_add_ and scatter_add_ are two spellings of one sum and round alike, rows or numbers.
# Seen:  a thousand ones are 1000 by scatter_add_, by sum, and by index_add_ of rows, but 256 by index_add_ of numbers, which
#        rounds to bfloat16 after every addition: 256 + 1 is 256 there. The gradients of x[i] and of an embedding's rows stop
#        at 256 as well, of a token that comes a thousand times; that of index_select does not.
# Here:  rows are added in float32 and rounded once, in both passes (moetrain/ops/scatter_add_rows.py).
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import sys

import torch
from torch.nn import functional

NUMBER = 1000
place = torch.zeros(NUMBER, dtype=torch.int64)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bfloat16)


def gradient(take):
    rows = torch.zeros(3, 16, dtype=torch.bfloat16, requires_grad=True)
    take(rows).sum().backward()
    return rows.grad[0, 0].item()


zero = torch.zeros(1, dtype=torch.bfloat16)
seen = {
    "sum": ones(NUMBER).sum().item(),
    "scatter_add_": zero.clone().scatter_add_(0, place, ones(NUMBER)).item(),
    "index_add_ of rows": torch.zeros_like(ones(3, 16)).index_add_(0, place, ones(NUMBER, 16))[0, 0].item(),
    "gradient of index_select": gradient(lambda rows: rows.index_select(0, place)),
    "index_add_ of numbers": zero.clone().index_add_(0, place, ones(NUMBER)).item(),
    "gradient of x[i]": gradient(lambda rows: rows[place]),
    "gradient of an embedding": gradient(lambda rows: functional.embedding(place, rows)),
}
print("\n".join(f"{name}: {value}" for name, value in seen.items()), "guess: 1000 each", sep="\n")
sys.exit(0 if list(seen.values()) == [1000] * 4 + [256] * 3 else 1)
PYTHON
verdict "$python" "$folder/show.py"
