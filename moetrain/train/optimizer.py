"""AdamW and SGD over this rank's shards.

Every shard is a plain tensor, so one optimizer serves dense and expert parameters. ``foreach`` is asked for
explicitly: the same elementwise operations on CPU and GPU, in an order that does not depend on the machine.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from moetrain.config import OptimConfig
from moetrain.train.shards import Shard

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(shards: Sequence[Shard], optim: OptimConfig, *, keep_empty: bool = False) -> Optimizer:
    """An optimizer over ``shards``.

    Args:
        shards: of this rank.
        optim: which one.
        keep_empty: experts of which this rank owns none may come later; else what is empty is left out.
    """

    def is_stepped(shard: Shard) -> bool:
        return shard.value.numel() > 0 or (keep_empty and shard.expert_layer is not None)

    groups = [
        {
            "params": [shard.value for shard in shards if shard.decay == decay and is_stepped(shard)],
            "weight_decay": optim.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(0))], "weight_decay": 0.0}]
    if optim.name == "sgd":
        return SGD(groups, lr=optim.lr, foreach=True)
    return AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, foreach=True)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Use ``lr`` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def moments(optimizer: Optimizer, shard: Shard) -> dict[str, Tensor]:
    """The optimizer's running moments of one shard, made (as zeros) where no step has been taken yet.

    SGD has none; those of an empty shard are empty.
    """
    if not isinstance(optimizer, AdamW):
        return {}
    state = optimizer.state[shard.value]
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(shard.value, memory_format=torch.preserve_format)
    return {moment: state[moment] for moment in MOMENTS}


def replace_moments(optimizer: Optimizer, shard: Shard, tensors: Sequence[Tensor], num_done: int) -> None:
    """Take over other moments, in the order of ``moments``, after ``num_done`` updates: the shard has other experts."""
    if isinstance(optimizer, AdamW):
        state = optimizer.state[shard.value]
        state["step"] = torch.tensor(float(num_done), dtype=torch.float32)
        state.update(zip(MOMENTS, tensors, strict=True))


def num_updates(optimizer: Optimizer) -> int:
    """How many updates AdamW has made (its bias correction needs the number); 0 for SGD."""
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    return max(steps, default=0)


def set_num_updates(optimizer: Optimizer, count: int) -> None:
    """Restore the number that ``num_updates`` gave."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(count))
