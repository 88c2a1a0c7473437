"""Names of a folded mesh's process groups, and which names are one group; arithmetic, like the mesh."""

from moetrain.mesh.folded_mesh import NODE_SETS, FoldedMesh

GROUP_NAMES = (
    "world",
    "data",
    "shard",
    "dp_replicate",
    "dp_shard",
    "cp",
    "tp",
    "pool",
    "dispatch",
    "edp",
    "ep",
    "etp",
    "pp",
)
ROWS = ("dispatch", "ep", "etp", *NODE_SETS)  # groups along which rows travel to experts and back
SPARSE = "sparse"
RING = "ring"
OF = {SPARSE: "pool", RING: "data"}  # the ranks of these again, with a communicator of their own


def sharing(mesh: FoldedMesh, rows_apart: bool, gangs: bool = False) -> dict[str, str]:
    """For each name the first name whose groups are the same; what that is does not depend on the rank.

    Groups are the translates of rank 0's along the axes that it leaves out, so two names that agree on rank 0's group
    agree on all of them. A rank alone sends nothing, so its group is one whatever its name.

    Args:
        mesh: where ranks stand.
        rows_apart: groups of ``ROWS`` are not shared with others.
        gangs: ranks may share sequences, which travel round rings of them.
    """
    first_name: dict[tuple[bool, tuple[int, ...]], str] = {}
    names = (*GROUP_NAMES, *(NODE_SETS if mesh.two_level else ()))
    found = {}
    for name in names:
        ranks = mesh.group_of(0, name)
        apart = rows_apart and name in ROWS and len(ranks) > 1
        found[name] = first_name.setdefault((apart, ranks), name)
    return found | {SPARSE: SPARSE} | ({RING: RING} if gangs else {})
