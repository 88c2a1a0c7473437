#!/usr/bin/env bash
# torch 2.11.0: views of DTensors.
#
# Guess: once a DTensor, its views and what DTensor caches are gone, so is its mesh, as it is without a view.
# Seen:  each time the sharding of an operator whose output aliases its input is worked out anew (detach, view, and so
#        nn.Parameter and FSDP2), a reference to its mesh is lost. The mesh lives until the process ends, and with it the
#        group that it was made of and the threads of that. Torch 2.13.0 frees it.
# Here:  tests and verify make groups anew for every case in processes that live on; what closes groups takes them out of
#        its meshes (moetrain/mesh/groups.py).
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.11.0
cat >"$folder/show.py" <<'PYTHON'
import gc
import sys
import weakref

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, debug, distribute_tensor

OPERATORS = {"x + x": lambda x: x + x, "x.clone()": torch.clone, "x.detach()": torch.detach, "x.view(4)": lambda x: x.view(4)}


def meshes_left(operator):
    """Of three meshes that were each used once and dropped."""
    meshes = []
    for _ in range(3):
        mesh = DeviceMesh.from_group(dist.new_group([0]), "cpu")
        operator(distribute_tensor(torch.arange(4.0), mesh, [Shard(0)]))
        meshes.append(weakref.ref(mesh))
        del mesh
        debug._clear_sharding_prop_cache()
        gc.collect()
    return sum(mesh() is not None for mesh in meshes)


dist.init_process_group("gloo", store=dist.FileStore(f"{sys.argv[1]}/store", 1), rank=0, world_size=1)
left = {name: meshes_left(operator) for name, operator in OPERATORS.items()}
dist.destroy_process_group()
for name, count in left.items():
    print(f"{name}: {count} of 3 meshes left, guess 0")
sys.exit(left != {"x + x": 0, "x.clone()": 0, "x.detach()": 3, "x.view(4)": 3})
PYTHON
verdict "$python" "$folder/show.py" "$folder"
