#!/usr/bin/env bash
# torch 2.13.0: token ids as torch.uint16 over gloo.
#
# Guess: a type that send and recv take is taken by all_gather as well, which moves bytes and adds nothing.
# Seen:  send and recv move uint16; all_gather, all_gather_into_tensor, broadcast and all_to_all_single refuse it
#        ("Invalid scalar type"), as they refuse uint32 and the float8 types. The same bytes viewed as uint8 are moved.
# Here:  corpora hold uint16 ids, which are widened to int64 as they are read (moetrain/data/), before anything is sent.
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import multiprocessing


def outcome(action):
    """What ``action`` gives, or the first line of its refusal."""
    try:
        return action()
    except RuntimeError as error:
        return str(error).splitlines()[0]


def sent(ids, rank):
    if rank == 0:
        dist.send(ids, 1)
        return ids.tolist()
    got = torch.zeros_like(ids)
    dist.recv(got, 0)
    return got.tolist()


def gathered(x):
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def gathered_into(x):
    out = x.new_empty(2 * len(x))
    dist.all_gather_into_tensor(out, x)
    return out.tolist()


def exchanged(x):
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out.tolist()


def main(rank, path):
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    ids = torch.tensor([1, 65535], dtype=torch.uint16)
    seen = {
        "send, recv": outcome(lambda: sent(ids, rank)),
        "all_gather": outcome(lambda: gathered(ids).tolist()),
        "all_gather_into_tensor": outcome(lambda: gathered_into(ids)),
        "broadcast": outcome(lambda: dist.broadcast(ids, 0)),
        "all_to_all_single": outcome(lambda: exchanged(ids)),
        "all_gather as uint8": outcome(lambda: gathered(ids.view(torch.uint8)).view(torch.uint16).tolist()),
    }
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print("\n".join(f"{name}: {what}" for name, what in seen.items()), "guess: none is refused", sep="\n")
    refused = {name for name, what in seen.items() if "Invalid scalar type" in str(what)}
    right = seen["send, recv"] == [1, 65535] and seen["all_gather as uint8"] == [1, 65535, 1, 65535]
    if not right or refused != {"all_gather", "all_gather_into_tensor", "broadcast", "all_to_all_single"}:
        sys.exit(1)


if __name__ == "__main__":
    multiprocessing.spawn(main, (f"{sys.argv[1]}/store",), nprocs=2)
PYTHON
verdict "$python" "$folder/show.py" "$folder"
