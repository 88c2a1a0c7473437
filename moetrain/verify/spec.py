"""What `moetrain verify` is asked to prove, checked before any process starts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from moetrain.config import RunConfig
from moetrain.config.errors import require, require_at_least, require_one_of
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.sequence import SequencePlan, StepPlanner
from moetrain.verify.batches import Domains, Row, make_documents, make_rows, table_of_rows
from moetrain.verify.layouts import Layout
from moetrain.verify.mutations import MUTATIONS
from moetrain.verify.small import CAPACITY, DTYPES, MICRO_BATCH, SEQ_LEN, SHORT, run_of_fields, small_fields

STEPS_LEFT = 3  # after those that are compared, so that the learning rate is not at its end


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySpec:
    """One comparison of a parallel run with the oracle.

    Attributes:
        ranks: local processes.
        mesh: attention axes, as ``"dp=2,tp=2"``; an unnamed one is 1.
        experts: expert axes, likewise; an unnamed edp is what remains.
        steps: optimizer steps; None: 3, but 1 with AdamW where experts stay.
        moe_layers: layers with experts, behind ``model.dense_first`` others.
        accumulation: rounds of one step.
        rows: packed rows of one step; None: all lanes full; fewer leave ranks without tokens.
        move_owners: experts get other owners, drawn, before each step, after its parameters have been loaded.
        mutate: a fault to put in, by its name.
        seed: of parameters and rows.
        changed: what differs from the scaled-down run of ``small``: (field, value) pairs, as ("moe.top_k", 6).
        run: the whole configuration that this makes.
    """

    ranks: int = 1
    mesh: str = ""
    experts: str = ""
    steps: int | None = None
    moe_layers: int = 2
    accumulation: int = 2
    rows: int | None = None
    move_owners: bool = False
    mutate: str | None = None
    seed: int = 0
    changed: tuple[tuple[str, Any], ...] = ()
    run: RunConfig = field(init=False, repr=False, compare=False)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """A comparison by its options: attributes of this class, fields of ``small.SHORT``, or dotted ones."""
        own = {name: options.pop(name) for name in OWN & options.keys()}
        changed = {SHORT.get(name, name): value for name, value in options.items()}
        return cls(**own, changed=tuple(changed.items()))

    def __post_init__(self) -> None:
        require_at_least("--ranks", self.ranks, 1)
        require_at_least("--moe-layers", self.moe_layers, 1)
        require_at_least("--accumulation", self.accumulation, 1)
        require_at_least("--seed", self.seed, 0)
        if self.steps is not None:
            require_at_least("--steps", self.steps, 1)
        if self.rows is not None:
            require_at_least("--rows", self.rows, 1)
        if self.mutate is not None:
            require_one_of("--mutate", self.mutate, MUTATIONS)
        object.__setattr__(self, "changed", tuple(sorted(self.changed)))
        object.__setattr__(self, "run", self._make_run(small_fields(dict(self.changed))))
        require(
            not self.run.placement.moves or self.num_steps > 1 or self._plans_within_a_step(),
            f"--steps {self.num_steps} would end before a plan of --placement {self.run.placement.planner} is used; "
            "use --steps 2, or --plan-every micro_batch with --accumulation 2",
        )
        require(
            not self.move_owners or self.run.placement.moves,
            "--move-owners needs experts that may move, but --placement is static; use --placement moetrain",
        )
        if self.mutate is not None:
            MUTATIONS[self.mutate].require_applies(self.run, self.move_owners)

    def _make_run(self, wanted: Mapping[str, Any]) -> RunConfig:
        """The scaled-down run on this mesh."""
        require_one_of("--dtype", wanted["train.dtype"], DTYPES)
        documents = "sequence.planner" in wanted
        planner, capacity = wanted.get("sequence.planner", "data"), wanted.get("sequence.capacity", CAPACITY)
        require(
            documents or "sequence.capacity" not in wanted,
            f"--capacity {capacity} is of documents, and there are rows; add --sequence data, context, bytescale or "
            "moetrain",
        )
        require(
            not documents or self.rows is None, f"--rows {self.rows} is of rows, but --sequence of documents; drop it"
        )
        nodes = {name: wanted[f"mesh.{name}"] for name in ("ranks_per_node", "two_level") if f"mesh.{name}" in wanted}
        heads, width = wanted["model.num_heads"], wanted["moe.expert_width"]
        moves = wanted.get("placement.planner", "static") != "static"
        layout = Layout(
            ranks=self.ranks,
            mesh=self.mesh or (f"{'cp' if planner == 'context' else 'dp'}={self.ranks}" if documents else ""),
            experts=self.experts,
            num_heads=heads,
            expert_width=width,
            moves=moves,
            **nodes,
        )
        mesh = layout.resolve()
        alone = wanted["optim.name"] == "adamw" and not moves  # plans are used from the second step on
        steps = self.steps if self.steps is not None else (1 if alone else 3)
        rows = self.rows if self.rows is not None else self.ranks // mesh.tp * MICRO_BATCH * self.accumulation
        others = {
            "model.num_layers": wanted["model.dense_first"] + self.moe_layers,
            "data.global_batch": rows,
            **(_of_documents(planner, capacity, self.ranks // mesh.tp, mesh.cp) if documents else {}),
            "train.steps": steps + STEPS_LEFT,
            "seed": self.seed,
        }
        return run_of_fields({**others, **wanted, **{f"mesh.{name}": size for name, size in asdict(mesh).items()}})

    def _plans_within_a_step(self) -> bool:
        return self.run.placement.plan_every == "micro_batch" and self.num_rows > self.num_lanes * MICRO_BATCH

    @property
    def num_steps(self) -> int:
        """Optimizer steps to compare."""
        return self.run.train.steps - STEPS_LEFT

    @property
    def num_rows(self) -> int:
        """Packed rows of one optimizer step over all ranks."""
        return self.run.data.global_batch

    @property
    def packs_documents(self) -> bool:
        """Whether sequences are documents, instead of rows of several."""
        return self.run.data.packing == "documents"

    def rows_of(self, step: int) -> list[Row]:
        """The sequences of one step."""
        vocab_size = self.run.model.vocab_size
        if not self.packs_documents:
            return make_rows(self.seed, step, self.num_rows, seq_len=SEQ_LEN, vocab_size=vocab_size)
        capacity = self.run.capacity
        return make_documents(
            self.seed,
            step,
            num_tokens=self.num_lanes * capacity * self.accumulation,
            longest=self.run.data.context,
            capacity=capacity,
            vocab_size=vocab_size,
        )

    def plan(self, rows: Sequence[Row]) -> SequencePlan:
        """Where the sequences of one step go: as in training."""
        return self.planner().plan(table_of_rows(rows))

    def planner(self) -> StepPlanner:
        """What plans each step."""
        return StepPlanner.of(self.run, FoldedMesh.of_run(self.run, self.ranks))

    @property
    def num_lanes(self) -> int:
        """Ranks that compute different rows; a tp group shares its own."""
        return self.ranks // self.run.mesh.tp

    @property
    def dtype(self) -> str:
        """Of the parallel run; it says how far rounding may take it."""
        return self.run.train.dtype

    def two_levels_in_words(self) -> str:
        """What dispatch in two levels amounts to here: that it is one level where an ep group has no two of both."""
        mesh = FoldedMesh.of_run(self.run, self.ranks)
        between, inside = len(mesh.group_of(0, "ep_between")), len(mesh.group_of(0, "ep_inside"))
        if between > 1 and inside > 1:
            return f"in two levels: {between} nodes of {inside} ranks in each ep group"
        where = "on one node" if between == 1 else "on as many nodes"
        return (
            f"in ONE level, though --two-level is given: the {mesh.ep} rank(s) of each ep group are {where}; choose "
            "--ranks-per-node, or ep, such that a group has several nodes with several ranks each"
        )

    def domains(self) -> Domains | None:
        """Whose tokens of a round rounding or capacity looks at together; None where nothing looks at a set.

        Dispatch groups when rounding, single ranks for capacity.
        """
        mesh = FoldedMesh.of_run(self.run, self.ranks)
        if self.run.dispatch.rounding != "none":
            groups = mesh.all_groups("ep")
            return Domains(mesh.tp, {rank: index for index, ranks in enumerate(groups) for rank in ranks})
        if self.run.dispatch.capacity_factor is not None:
            return Domains(mesh.tp, {rank: rank for rank in range(self.ranks)})
        return None

    def with_seed(self, seed: int) -> "VerifySpec":
        """The same comparison on other numbers."""
        return replace(self, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in sorted(OWN)} | {"changed": dict(self.changed)}


def _of_documents(planner: str, capacity: int, num_lanes: int, cp: int) -> dict[str, Any]:
    """Documents as long as may be: all lanes hold the longest one together, or those that a planner lets share one."""
    lanes = {"data": 1, "context": cp}.get(planner, num_lanes)
    return {
        "data.packing": "documents",
        "data.context": capacity // 2 * 2 * lanes,
        "sequence.capacity": capacity,
    }


OWN = frozenset(item.name for item in fields(VerifySpec)) - {"changed", "run"}
