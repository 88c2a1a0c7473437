"""What a run's layers cost on this machine, for planners that weigh work against bytes.

Shapes: P pairs, D width, F hidden width of a shard, E experts of the sample.
"""

from collections.abc import Callable

import torch

from moetrain.config import RunConfig
from moetrain.cost.measure import LayerSample, Peers, measure_costs
from moetrain.cost.step_costs import StepCosts
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.ops import expert_mlp
from moetrain.placement.chunks import ExpertShape
from moetrain.train.engine import Engine

EXPERTS = 2  # of the sample
FLOPS = {"cpu": 1e9, "cuda": 1e12}  # of the sample, which a core or a GPU does in some ten milliseconds
MOST_PAIRS = 2048


def measure_run_costs(engine: Engine) -> StepCosts:
    """Measure on the first rank with the run's shapes and types. Collective over all ranks; equal on all."""
    group = engine.groups.group("world")
    return measure_costs(layer_sample(engine), peers_of(engine.groups.mesh), group, engine.device)


def in_words(costs: StepCosts) -> str:
    """For whoever watches a run."""
    return (
        f"a pair {costs.pair_s * 1e6:.3g} us, a row {costs.near_row_s * 1e6:.3g} us inside a node and "
        f"{costs.far_row_s * 1e6:.3g} us between nodes, a replica {costs.expert_s * 1e3:.3g} ms, of which other work "
        f"hides {costs.overlap_s * 1e3:.3g} ms"
    )


def peers_of(mesh: FoldedMesh) -> Peers:
    """A rank of rank 0's node, and one of the next node."""
    per_node = mesh.ranks_per_node
    return Peers(
        near=1 if min(per_node, mesh.world_size) > 1 else None,
        far=per_node if per_node < mesh.world_size else None,
    )


def layer_sample(engine: Engine) -> LayerSample:
    """A layer of the engine's model, of which a few experts are computed."""
    run, shape = engine.run, engine.expert_shape.shard(engine.groups.mesh.etp)
    compute, wide = engine.compute_dtype, torch.promote_types(engine.compute_dtype, torch.float32)
    pair_flops = 6.0 * shape.num_parameters  # a product takes 2, and a backward pass has two for each
    fitting = int(FLOPS[engine.device.type] / pair_flops)
    num_pairs = EXPERTS * min(MOST_PAIRS, max(8, fitting // EXPERTS))
    return LayerSample(
        compute=_expert_passes(run, shape, num_pairs, compute, engine.device),
        num_pairs=num_pairs,
        pair_flops=pair_flops,
        other_flops=attention_flops(run),
        hides=engine.device.type == "cuda",
        row_bytes=shape.width * compute.itemsize,
        expert_bytes=shape.num_parameters * (compute.itemsize + wide.itemsize),
    )


def attention_flops(run: RunConfig) -> float:
    """Forward and backward pass of one layer's attention on a rank's micro-batch; scores are of half a square."""
    model, seq_len = run.model, run.data.seq_len
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    per_token = 2.0 * model.width * (2 * queries + 2 * keys) + 2.0 * seq_len * queries
    return 3.0 * per_token * run.data.micro_batch * seq_len / run.mesh.tp


def _expert_passes(
    run: RunConfig, shape: ExpertShape, num_pairs: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """Forward and backward pass of a few experts on random rows, each row one pair."""
    drawn = torch.Generator().manual_seed(0)  # of its own: a run draws what it would have drawn

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=drawn).to(device, dtype).requires_grad_()

    x_PD = normal(num_pairs, shape.width)
    weight_P = torch.ones(num_pairs, dtype=torch.promote_types(dtype, torch.float32), device=device).requires_grad_()
    w_in = normal(EXPERTS, *shape.w_in_shape)
    w_out = normal(EXPERTS, *shape.w_out_shape)
    row_P = torch.arange(num_pairs, dtype=torch.int32, device=device)
    offset_E1 = torch.arange(EXPERTS + 1, dtype=torch.int32, device=device) * (num_pairs // EXPERTS)

    def passes() -> object:
        y_PD = expert_mlp(
            x_PD, row_P, weight_P, offset_E1, w_in, w_out,
            activation=run.moe.activation, recompute_h=run.moe.recompute_hidden,
        )  # fmt: skip
        return torch.autograd.grad(y_PD, (x_PD, weight_P, w_in, w_out), torch.ones_like(y_PD))

    return passes
