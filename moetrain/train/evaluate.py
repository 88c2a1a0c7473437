"""Validation: the mean cross-entropy of fixed rows, each token weighing the same however rows fell on ranks."""

import torch

from moetrain.data.loader import StepLoader
from moetrain.mesh.collectives import all_reduce_sum
from moetrain.sequence.planner import StepPlanner
from moetrain.train.engine import Engine


@torch.no_grad()
def evaluate(engine: Engine, loader: StepLoader, num_rows: int) -> float | None:
    """Mean cross-entropy, in nats per loss token, of the sequences [0, ``num_rows``) of the loader's split. Collective.

    None where these have no loss token. Nothing is counted for balancing, and no gradient is kept. What is sent is
    counted apart, as ``"evaluation_*"``, expert weights too: where weights are kept the next step has them.
    """
    groups = engine.groups
    planner = StepPlanner.of(engine.run, groups.mesh, engine.sequence_costs).for_evaluation()
    plan = planner.plan(loader.table(0, num_rows))
    if plan.num_loss_tokens == 0:
        return None
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    was_training = engine.model.training
    engine.model.eval()
    try:
        with engine.traffic.apart("evaluation"):
            for round_idx in range(plan.num_rounds(engine.lane.rank)):
                batch = loader.batch(plan, engine.lane.rank, round_idx)
                ring = engine.lane.ring(batch)
                total += engine.model(batch.to(engine.device), num_step_tokens=plan.num_tokens, ring=ring).ce_sum
    finally:
        engine.model.train(was_training)
    return float(all_reduce_sum(total, groups.group("data"))) / plan.num_loss_tokens
