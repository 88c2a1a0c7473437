#!/usr/bin/env bash
# torch 2.13.0: selective activation checkpointing around a module under FSDP2.
#
# Guess: what works on two ranks works on one; and a policy that saves matrix products says nothing of other operators.
# Seen:  on a mesh of one rank the backward pass raises: FSDP's own profiling marks count as operators of the region,
#        and there are more of them when it is recomputed than there were in the forward pass. Two ranks work, and so
#        does plain checkpointing.
# Here:  moetrain/moe/context.py shows the replaying mode the saved operators alone.
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

SELECTIVE = {"context_fn": partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])}


class Block(nn.Module):
    """Two layers that are recomputed; the first has an FSDP group of its own."""

    def __init__(self, options):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.options = options

    def forward(self, x):
        return checkpoint(lambda x: self.second(self.first(x)), x, use_reentrant=False, **self.options)


def outcome(mesh, options):
    """``works``, or what the backward pass says."""
    model = nn.Sequential(Block(options), Block(options))
    for block in model:
        fully_shard(block.first, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    try:
        model(torch.ones(2, 4)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return "works"


def main(rank, path, num_ranks):
    store = dist.FileStore(f"{path}/{num_ranks}", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    mesh = init_device_mesh("cpu", (num_ranks,))
    plain, selective = outcome(mesh, {}), outcome(mesh, SELECTIVE)
    if rank == 0:
        print(f"{num_ranks} rank(s): plain {plain!r}, selective {selective[:100]!r}")
    dist.barrier()
    dist.destroy_process_group()
    refused = "profiler._record_function_enter_new.default" in selective and "not found in storage" in selective
    if plain != "works" or not (refused if num_ranks == 1 else selective == "works"):
        sys.exit(1)


if __name__ == "__main__":
    for num_ranks in (2, 1):
        multiprocessing.spawn(main, (sys.argv[1], num_ranks), nprocs=num_ranks)
    print("guess: all work")
PYTHON
verdict "$python" "$folder/show.py" "$folder"
