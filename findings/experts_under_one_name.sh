#!/usr/bin/env bash
# torch 2.13.0: FSDP2 over one axis of a mesh, and distributed checkpoints.
#
# Guess: experts that are split over ranks (axis ep) and sharded by FSDP2 over the other axis (dp) are saved apart, for
#        they are different shards on different ranks; or saving complains of two values for one name.
# Seen:  a parameter knows the axis that it is sharded over and no other. All ep ranks have the same name, shape and
#        offsets, so they pass as copies of one tensor: the experts of one ep rank are saved, and loading gives them to
#        all, without a word.
# Here:  a checkpoint has one key per expert, by its global id (moetrain/checkpoint/).
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main(rank, path):
    dist.init_process_group("gloo", store=dist.FileStore(f"{path}/store", 4), rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "dp"))
    expert = nn.Linear(2, 2, bias=False)
    nn.init.constant_(expert.weight, 10.0 + mesh["ep"].get_local_rank())
    fully_shard(expert, mesh=mesh["dp"])
    dcp.save({"expert.weight": expert.state_dict()["weight"]}, checkpoint_id=f"{path}/checkpoint")
    loaded = torch.zeros_like(expert.state_dict()["weight"])
    dcp.load({"expert.weight": loaded}, checkpoint_id=f"{path}/checkpoint")
    before, after = (tensor.to_local().unique().item() for tensor in (expert.weight.detach(), loaded))
    everything = [None] * 4
    dist.all_gather_object(everything, (before, after))
    if rank == 0:
        print(f"by rank, saved then loaded: {everything}")
        print("guess: loaded as saved, or an error")
    dist.barrier()
    dist.destroy_process_group()
    if [saved for saved, _ in everything] != [10.0, 10.0, 11.0, 11.0] or len({one for _, one in everything}) != 1:
        sys.exit(1)


if __name__ == "__main__":
    multiprocessing.spawn(main, (sys.argv[1],), nprocs=4)
PYTHON
verdict "$python" "$folder/show.py" "$folder"
