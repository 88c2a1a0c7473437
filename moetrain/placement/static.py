"""The placement that never moves: expert parallelism over ep, with experts' data parallelism over edp."""

from moetrain.config.errors import NotBuiltYetError, require_at_least
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.placement.placement import Placement, one_holder_quotas


def plan_static(mesh: FoldedMesh, num_experts: int) -> Placement:
    """Spread ``num_experts`` evenly over ep; the edp ranks of an ep coordinate hold the same experts.

    ep coordinate j holds experts [j E // ep, (j + 1) E // ep), possibly none. Each expert is cut into edp slices,
    owned by one of its edp holders each, which makes the sparse collectives ZeRO-1's balanced ones. A rank sends its
    tokens to the holder with its own edp coordinate.

    Raises:
        ValueError: ``num_experts`` is below 1.
        NotBuiltYetError: the mesh cuts experts over etp.
    """
    require_at_least("plan_static: num_experts", num_experts, 1)
    if mesh.etp > 1:
        raise NotBuiltYetError("mesh.etp", mesh.etp, "set mesh.etp to 1")
    holders: list[tuple[int, ...]] = []
    for ep_idx in range(mesh.ep):
        column = tuple(edp_idx * mesh.ep + ep_idx for edp_idx in range(mesh.edp))
        count = (ep_idx + 1) * num_experts // mesh.ep - ep_idx * num_experts // mesh.ep
        holders.extend([column] * count)
    by_edp = [one_holder_quotas(range(num_experts), edp_idx, mesh.edp) for edp_idx in range(mesh.edp)]
    quotas = tuple(by_edp[rank // mesh.ep] for rank in range(mesh.pool_size))
    return Placement(mesh.pool_size, tuple(holders), tuple(holders), quotas)
