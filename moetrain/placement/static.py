"""The placement that never moves: expert parallelism over ep, shards over etp, data parallelism over edp."""

from moetrain.config.errors import require_at_least
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.placement.placement import Affinity, Placement


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
    holders: list[tuple[int, ...]] = []
    for ep_idx in range(mesh.ep):
        column = tuple(edp_idx * mesh.ep + ep_idx for edp_idx in range(mesh.edp))
        holders.extend([column] * ((ep_idx + 1) * num_experts // mesh.ep - ep_idx * num_experts // mesh.ep))
    return Placement.of(
        mesh.edp * mesh.ep,
        owners=holders,
        holders=holders,
        affinity=Affinity(home=1, near=1, far=0),
        domain_size=mesh.ep,
        num_shards=mesh.etp,
    )
