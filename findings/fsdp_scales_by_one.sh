#!/usr/bin/env bash
# torch 2.13.0: FSDP2 on gloo, with gradients summed instead of averaged.
#
# Guess: set_gradient_divide_factor(1.0) asks for a plain sum, which is less than the default: that divides by the
#        number of ranks.
# Seen:  any factor but the default asks the backend for a scaled sum, 1.0 too, which gloo does not have: the backward
#        pass raises. A factor that happens to equal the number of ranks works. set_force_sum_reduction_for_comms(True)
#        makes it the plain sum.
# Here:  losses are divided once by the global number of tokens, so that FSDP must only sum: moetrain/models/build.py.
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def gradient(mesh, factor, plain_sum):
    """One number of a gradient that is 2 on each of the two ranks, or what the backward pass says."""
    layer = nn.Linear(4, 4)
    fully_shard(layer, mesh=mesh)
    if factor is not None:
        layer.set_gradient_divide_factor(factor)
    layer.set_force_sum_reduction_for_comms(plain_sum)
    try:
        layer(torch.ones(2, 4)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return layer.weight.grad.full_tensor()[0, 0].item()


def main(rank, path):
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    seen = [gradient(mesh, *case) for case in ((None, False), (2.0, False), (1.0, False), (1.0, True))]
    if rank == 0:
        print(f"default {seen[0]}, factor 2.0 {seen[1]}, factor 1.0 {seen[2]!r}, 1.0 by a plain sum {seen[3]}")
        print("guess: 2.0, 2.0, 4.0, 4.0")
    dist.barrier()
    dist.destroy_process_group()
    if seen != [2.0, 2.0, "Cannot use ReduceOp.PREMUL_SUM with Gloo", 4.0]:
        sys.exit(1)


if __name__ == "__main__":
    multiprocessing.spawn(main, (f"{sys.argv[1]}/store",), nprocs=2)
PYTHON
verdict "$python" "$folder/show.py" "$folder"
