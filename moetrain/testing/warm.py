"""Imports what every rank would import, in the one process that ranks are forked from.

Of the two seconds that a rank would spend, 1.1 are torch's, 0.7 FSDP's and DTensor's, and 0.5 the compiler's, which
``fully_shard`` imports when it is first called. Nothing here starts a thread: none would live on in a fork.
"""

import gc

import torch
import torch._dynamo

import moetrain.train.engine  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # else a collection in a rank would write to, and so copy, every page that it shares
