#!/usr/bin/env bash
# torch 2.13.0: asking a message over gloo whether it has arrived.
#
# Guess: the work of isend and irecv tells by is_completed() when the message is through, as that of all_reduce does, so
#        that a ring can look and compute on.
# Seen:  of all_reduce(async_op=True) is_completed() turns true by itself. Of isend and irecv it is false still a second
#        after the numbers are in the receiver's tensor; only wait() turns it.
# Here:  replicas in flight are waited for at places fixed beforehand, the same on all ranks (moetrain/placement/store.py),
#        and nothing is polled.
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import multiprocessing


def became_true(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def main(rank, path):
    dist.init_process_group(
        "gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    ones = torch.ones(4)
    reducing = dist.all_reduce(ones, async_op=True)
    seen = [became_true(reducing.is_completed)]
    reducing.wait()
    numbers = torch.arange(4.0) if rank == 0 else torch.full((4,), -1.0)
    moving = dist.isend(numbers, 1) if rank == 0 else dist.irecv(numbers, 0)
    arrived = became_true(lambda: numbers.tolist() == [0, 1, 2, 3])
    time.sleep(1.0)
    seen += [arrived, moving.is_completed()]
    moving.wait()
    seen.append(moving.is_completed())
    all_seen = [None, None]
    dist.all_gather_object(all_seen, seen)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        for name, one in zip(("isend", "irecv"), all_seen):
            print(f"all_reduce complete: {one[0]}; {name}: arrived {one[1]}, complete {one[2]}, after wait {one[3]}")
        print("guess: complete True before wait")
    sys.exit(0 if all_seen == [[True, True, False, True]] * 2 else 1)


if __name__ == "__main__":
    context = multiprocessing.spawn(main, (sys.argv[1],), nprocs=2, join=False)
    try:
        while not context.join():
            pass
    except multiprocessing.ProcessExitedException:
        sys.exit(1)
PYTHON
verdict "$python" "$folder/show.py" "$folder/store"
