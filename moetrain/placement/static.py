"""The placement that never moves: expert parallelism over ep, shards over etp, data parallelism over edp."""

from moetrain.config.errors import require_at_least
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.placement.placement import Placement, one_holder_quotas


def plan_static(mesh: FoldedMesh, num_experts: int) -> Placement:
    """Spread ``num_experts`` evenly over ep; the edp x etp ranks of an ep coordinate hold the same experts.

    ep coordinate j holds experts [j E // ep, (j + 1) E // ep), possibly none, of which etp coordinate c has shard c. A
    shard is cut into edp slices, owned by one of its edp holders each, which makes the sparse collectives ZeRO-1's
    balanced ones: every rank of the pool owns as much as the others of its ep coordinate. A rank sends its tokens to
    the holder with its own edp and etp coordinates.

    Raises:
        ValueError: ``num_experts`` is below 1.
    """
    require_at_least("plan_static: num_experts", num_experts, 1)
    edp, ep, etp = range(mesh.edp), range(mesh.ep), range(mesh.etp)
    owners: list[tuple[int, ...]] = []
    holders: list[tuple[int, ...]] = []
    for ep_idx in ep:
        column = [[(edp_idx * mesh.ep + ep_idx) * mesh.etp + shard for shard in etp] for edp_idx in edp]
        count = (ep_idx + 1) * num_experts // mesh.ep - ep_idx * num_experts // mesh.ep
        owners.extend([tuple(column[edp_idx][shard] for shard in etp for edp_idx in edp)] * count)
        holders.extend([tuple(rank for ranks in column for rank in ranks)] * count)
    serving = [
        one_holder_quotas(range(num_experts), holder, mesh.edp * mesh.etp) for holder in range(len(edp) * len(etp))
    ]
    quotas = tuple(serving[edp_idx * mesh.etp + shard] for edp_idx in edp for _ in ep for shard in etp)
    return Placement(mesh.pool_size, tuple(owners), tuple(holders), quotas, mesh.etp)
