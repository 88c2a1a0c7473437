#!/usr/bin/env bash
# torch 2.13.0, CPU: topk among equal scores.
#
# Guess: topk promises no order among equals, but some rule stands behind it: the best one is among the best two, and
#        argmax agrees with k = 1.
# Seen:  neither. Of 64 equal scores k = 1 takes index 0, k = 2 takes 42 and 43. A router at its symmetric start, or
#        with saturated scores, chooses other experts for another top_k, and others than argmax.
# Here:  moetrain's selection is a total order, score descending and expert id ascending (select_experts), or no two
#        ways of cutting a batch would agree; torch.topk is used nowhere in its place.
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import torch

right = True
for size, nested, argmax_agrees in ((64, False, True), (8, True, False), (2048, True, True)):
    score = torch.zeros(size)
    best = {k: set(score.topk(k).indices.tolist()) for k in (1, 2, 4)}
    print(f"{size} equal scores: k = 1 {best[1]}, k = 2 {best[2]}, k = 4 {best[4]}; argmax {score.argmax().item()}")
    right &= (best[1] <= best[2] <= best[4]) == nested
    right &= ({score.argmax().item()} == best[1]) == argmax_agrees
print("guess: each set is within the next, and argmax is the first")
raise SystemExit(not right)
PYTHON
verdict "$python" "$folder/show.py"
