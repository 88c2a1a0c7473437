#!/usr/bin/env bash
# torch 2.13.0: process groups over gloo.
#
# Guess: a group over ranks that have one already, and that nothing was sent through yet, costs a rank next to nothing.
# Seen:  three threads in every rank of it, from new_group on. destroy_process_group does not end them while any
#        reference to the group lives; once the last is gone, they are.
# Here:  groups of the same ranks are one group (moetrain/mesh/sharing.py), and ranks that are used for case after case
#        let go of every mesh and engine in between (moetrain/testing/).
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import gc
import os
import sys

import torch
import torch.distributed as dist
from torch import multiprocessing

GROUPS = 4


def num_threads():
    return len(os.listdir("/proc/self/task"))


def main(rank, path):
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1))
    before = num_threads()
    groups = [dist.new_group([0, 1]) for _ in range(GROUPS)]
    made = num_threads() - before
    for group in groups:
        dist.all_reduce(torch.ones(1), group=group)
    used = num_threads() - before
    for group in groups:
        dist.destroy_process_group(group)
    destroyed = num_threads() - before
    del group, groups
    gc.collect()
    let_go = num_threads() - before
    if rank == 0:
        print(f"threads more, with {GROUPS} groups made {made}, used {used}, destroyed {destroyed}, let go {let_go}")
        print("guess: 0 made, 0 destroyed")
    dist.barrier()
    dist.destroy_process_group()
    if (made, used, destroyed, let_go) != (3 * GROUPS, 3 * GROUPS, 3 * GROUPS, 0):
        sys.exit(1)


if __name__ == "__main__":
    multiprocessing.spawn(main, (f"{sys.argv[1]}/store",), nprocs=2)
PYTHON
verdict "$python" "$folder/show.py" "$folder"
