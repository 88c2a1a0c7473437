#!/usr/bin/env bash
# torch 2.13.0: DTensor, where a process group is destroyed and another one made over the same ranks.
#
# Guess: a tensor made of tensors of the new mesh is on the new mesh.
# Seen:  the sharding of an operator is cached by meshes that compare equal, and two meshes of the same ranks do,
#        whatever their groups. The second x + x is on the first mesh, whose group is gone, and gathering it raises.
# Here:  tests and verify make groups anew for every case in processes that live on; they clear that cache between cases
#        (moetrain/testing/).
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor


def main(rank, path):
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    seen = []
    for _ in range(2):
        group = dist.new_group([0, 1])
        mesh = DeviceMesh.from_group(group, "cpu")
        x = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
        y = x + x
        try:
            gathered = y.full_tensor().tolist()
        except RuntimeError as error:
            gathered = str(error)
        seen.append((x.device_mesh is mesh, y.device_mesh is mesh, gathered))
        dist.destroy_process_group(group)
    if rank == 0:
        for turn, (of_x, of_sum, gathered) in enumerate(seen, 1):
            print(f"turn {turn}: x is on the new mesh {of_x}, x + x {of_sum}, gathered {gathered!r}")
        print("guess: turn 2 as turn 1")
    dist.barrier()
    dist.destroy_process_group()
    first, second = seen
    lost = isinstance(second[2], str) and "Could not resolve the process group" in second[2]
    if first != (True, True, [0.0, 2.0, 4.0, 6.0]) or second[:2] != (True, False) or not lost:
        sys.exit(1)


if __name__ == "__main__":
    multiprocessing.spawn(main, (f"{sys.argv[1]}/store",), nprocs=2)
PYTHON
verdict "$python" "$folder/show.py" "$folder"
