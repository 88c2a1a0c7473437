#!/usr/bin/env bash
# torch 2.13.0: saved_tensors_hooks around torch.utils.checkpoint(use_reentrant=False).
#
# Guess: inside of a checkpoint nothing is saved, and its inputs are kept by a closure; so hooks around it that move
#        saved tensors elsewhere see none of it, and a checkpointed model keeps its blocks' inputs where they are.
# Seen:  the inputs that are tensors are saved for the backward pass like any operator's, once per checkpoint, so that
#        the hooks get them, also those that need no gradient; what the recomputation asks for comes through the hooks.
# Here:  sequence.offload lets the layers' inputs wait on the host where activations are recomputed, without a word in
#        the model (moetrain/sequence/offload.py).
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import sys

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

packed, unpacked = [], []


def pack(x):
    packed.append(tuple(x.shape))
    return x.detach().clone()


def unpack(x):
    unpacked.append(tuple(x.shape))
    return x


weight = torch.ones(5, 5, requires_grad=True)


def block(x, mask):
    return torch.tanh(x @ weight) * mask


def passes(recompute):
    packed.clear()
    unpacked.clear()
    x, mask = torch.randn(3, 5), torch.ones(3, 1)  # neither needs a gradient
    with saved_tensors_hooks(pack, unpack):
        y = checkpoint(block, x, mask, use_reentrant=False) if recompute else block(x, mask)
    y.sum().backward()
    return list(packed), list(unpacked)


plain, recomputed = passes(False), passes(True)
print(f"without a checkpoint: packed {plain[0]}")
print(f"with a checkpoint:    packed {recomputed[0]}, unpacked {recomputed[1]}")
print("guess: with a checkpoint nothing is packed")
sys.exit(0 if sorted(recomputed[0]) == sorted(recomputed[1]) == [(3, 1), (3, 5)] else 1)
PYTHON
verdict "$python" "$folder/show.py"
