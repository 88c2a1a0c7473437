"""Plans where experts are, step by step, beside the training: loads in, placements and owners out.

    last forward pass     loads of all nodes are summed                            "pool", under way
    backward pass         a thread predicts the next loads and plans for them      without Python's lock
    end of the step       all ranks compare their plans; owners move; holders change

Every rank makes the same plan of the same numbers, and none is used before all ranks have compared it.
Shapes: L MoE layers, E experts, N nodes of the pool.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.config import PlacementConfig
from moetrain.cost.step_costs import UNMEASURED, StepCosts
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.placement.current import CurrentPlacement
from moetrain.placement.loads import ExpertLoads, NodeLoads
from moetrain.placement.placement import Placement
from moetrain.placement.planner.calibrate import calibrate
from moetrain.placement.planner.plan import PlannerSetup, plan_layers
from moetrain.placement.planner.predict import LoadPredictor, make_predictor
from moetrain.placement.planner.reshard import move_owners

# Owners of all layers for the next steps: (expected loads, today's owners, number of the plan) -> owners.
ChooseOwners = Callable[[Tensor, Tensor, int], Tensor]


class PlacementMismatchError(RuntimeError):
    """Ranks have made different plans; none of them has been used."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Where the experts of all layers will be.

    Attributes:
        number: plans are numbered from 1.
        placements: by layer.
        moves: layers whose experts have other owners than before.
        error: how far the loads were from what had been predicted for them; None for the first.
    """

    number: int
    placements: dict[int, Placement]
    moves: tuple[int, ...]
    error: float | None

    def digest(self) -> int:
        """A number below 2^63 that is equal where plans are."""
        whole = hashlib.sha256("".join(one.content_hash() for one in self.placements.values()).encode())
        return int.from_bytes(whole.digest()[:8], "big") >> 1


class Placing:
    """The placements of a run's layers over time. Its methods are called by all ranks at the same places of a step."""

    def __init__(
        self,
        config: PlacementConfig,
        placed: Mapping[int, CurrentPlacement],
        loads: ExpertLoads | None,
        groups: MeshGroups,
        costs: StepCosts,
        *,
        seed: int,
        most_owned: int | None = None,
    ) -> None:
        """Prepare.

        Args:
            config: which planner, and how often.
            placed: of each MoE layer; read by dispatch and store, set here.
            loads: what this rank's layers count; None where nothing moves.
            groups: this rank's process groups.
            costs: what to weigh against what; equal on all ranks.
            seed: of what is drawn.
            most_owned: experts of a layer that a group may own, where messages are sized by that.
        """
        self.most_owned = most_owned
        self.config = config
        self.placed = dict(sorted(placed.items()))
        self.choose_owners: ChooseOwners = self._worth_moving
        self.costs = costs
        self.mesh = groups.mesh
        self.num_plans = 0
        self.error: float | None = None
        self._loads = loads
        self._groups = groups
        self._seed = seed
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
        self._planning: Future[Plan] | None = None
        if config.moves:
            first = next(iter(self.placed.values())).now
            self.setup = PlannerSetup(
                planner=config.planner,
                num_experts=first.num_experts,
                num_groups=first.num_groups,
                groups_per_node=pool_layout(groups.mesh)["groups per node"],
                num_shards=first.num_shards,
                slots=config.slots,
                costs=costs,
                seed=seed,
            )
            self.predictor: LoadPredictor = make_predictor(
                config.predictor, len(self.placed), self.setup.num_nodes, first.num_experts
            )

    @property
    def weighs_costs(self) -> bool:
        """Whether plans depend on costs."""
        return self.config.planner in ("hecate", "moetrain")

    def use_costs(self, costs: StepCosts) -> None:
        """Weigh by other costs from the next plan on. Equal on all ranks; none may be planning."""
        assert self._planning is None, "costs change between steps"
        self.costs = costs
        if self.config.moves:
            self.setup = replace(self.setup, costs=costs)

    def measured_costs(self) -> dict[str, float]:
        """As plain values; none where they were not measured."""
        return {} if self.costs == UNMEASURED else self.costs.to_dict()

    def reduces(self, *, is_last: bool) -> bool:
        """Whether a round's gradients go home with its backward pass; else they wait for those of later rounds."""
        return is_last or self.config.calibrate or (self.config.moves and self.config.plan_every == "micro_batch")

    def forward_done(self, step: int, *, is_last: bool) -> None:
        """Start to plan, after a round's forward pass of step ``step`` (from 0), for what comes after the round."""
        if not self.config.moves or not (is_last or self.config.plan_every == "micro_batch"):
            return
        every = self.config.move_owners_every
        moves = is_last and every > 0 and (step + 1) % every == 0
        self.num_plans += 1
        assert self._loads is not None
        counts = self._node_loads(self._loads.take())
        self._planning = self._thread.submit(self._plan, counts, self.owners(), self.num_plans, moves)

    def planned(self) -> Plan | None:
        """The plan that has been started, once it is there; None where nothing moves."""
        if self._planning is None:
            return None
        plan, self._planning = self._planning.result(), None
        self.error = plan.error
        return plan

    def begin_step(self) -> None:
        """Forget what a step left behind that did not come to its end: a plan that nobody has compared, loads."""
        if self._planning is not None:
            self._planning.cancel()
            with suppress(Exception):  # whatever it was, that step has told of it
                self._planning.result()
            self._planning = None
        if self._loads is not None:
            self._loads.take_step()

    def between_rounds(self, step: int) -> None:
        """Take the next plan within a step, after comparing it; owners stay until its end."""
        plan = self.planned()
        if plan is not None:
            assert not plan.moves, "owners move at the end of a step"
            mine = torch.tensor([plan.digest()], device=self._groups.device_type)
            found_W1 = [torch.empty_like(mine) for _ in range(self._groups.size("pool"))]
            dist.all_gather(found_W1, mine, group=self._groups.group("pool"))
            self.compare(plan, step, [int(one) for one in found_W1], "pool")
            self.take(plan)

    def compare(self, plan: Plan, step: int, digests: Sequence[int], group: str) -> None:
        """Refuse plans that differ. Collective over the mesh group ``group``, whose digests these are.

        Raises:
            PlacementMismatchError: on every rank, naming the step, the first layer that differs, and the ranks.
        """
        if len(set(digests)) == 1:
            return
        hashes: list[dict[int, str]] = [{} for _ in digests]
        mine = {layer: one.content_hash() for layer, one in plan.placements.items()}
        dist.all_gather_object(hashes, mine, group=self._groups.group(group))
        ranks = self._groups.ranks(group)
        layer = next((one for one in mine if len({found.get(one) for found in hashes}) > 1), None)
        same: dict[str | None, list[int]] = {}
        for rank, found in zip(ranks, hashes, strict=True):
            same.setdefault(None if layer is None else found.get(layer), []).append(rank)
        raise PlacementMismatchError(
            f"step {step}: ranks have planned different placements of layer {layer}: "
            f"{' against '.join(f'ranks {some}' for some in same.values())}; none has been used. Machines must run "
            "one build of moetrain and see the same loads"
        )

    def take(self, plan: Plan) -> None:
        """Use a plan from the next micro-batch on. Owners must have moved already, where the plan moves some."""
        for layer, placement in plan.placements.items():
            self.placed[layer].set(placement)

    def calibrate(self, layer: int, offset_E1: Tensor, present: Placement | None) -> Placement | None:
        """A placement for the true loads of one layer and micro-batch, if it is modelled to pay with nothing hidden.

        Collective over the pool; every rank comes to the same decision.

        Args:
            layer: index of the layer.
            offset_E1: where each expert's pairs of this rank begin.
            present: where experts are in this micro-batch.
        """
        if present is None:
            return None
        counts = self._node_loads(offset_E1.diff().unsqueeze(0)).wait().float()
        better = calibrate(self.setup, counts[0], present)
        return None if better is present else better

    def _node_loads(self, count_LE: Tensor) -> NodeLoads:
        node = self._groups.pool_rank // (self.setup.groups_per_node * self.setup.num_shards)
        return NodeLoads(count_LE, node, self.setup.num_nodes, self._groups.group("pool"))

    def relocate(self, owner_LE: Tensor) -> Plan:
        """A plan for these owners and the loads expected now; without any expectation owners alone hold experts."""
        self.num_plans += 1
        expected_LNE = self.predictor.predict()
        if expected_LNE is None:
            expected_LNE = torch.zeros(self.predictor.shape)
        return self._plan_for(expected_LNE, self.owners(), owner_LE, self.num_plans)

    def plan_again(self) -> Plan | None:
        """The newest plan made once more, as after loading a checkpoint; None where there was none."""
        expected_LNE, owner_LE = self.predictor.predict(), self.owners()
        if expected_LNE is None:
            return None
        return self._plan_for(expected_LNE, owner_LE, owner_LE, self.num_plans)

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=True)

    def owners(self) -> Tensor:
        """int32 [L, E]: the group that owns each expert now."""
        return torch.stack([one.now.owner_ES[:, 0] for one in self.placed.values()])

    def _plan(self, counts: NodeLoads, owner_LE: Tensor, number: int, moves: bool) -> Plan:
        self.predictor.observe(counts.wait())
        expected_LNE = self.predictor.predict()
        assert expected_LNE is not None
        new_LE = self.choose_owners(expected_LNE, owner_LE, number) if moves else owner_LE
        return self._plan_for(expected_LNE, owner_LE, new_LE, number)

    def _plan_for(self, expected_LNE: Tensor, owner_LE: Tensor, new_LE: Tensor, number: int) -> Plan:
        layers, _ = plan_layers(self.setup, expected_LNE, new_LE, step=number)
        changed = [
            layer for layer, moved in zip(self.placed, (new_LE != owner_LE).any(1).tolist(), strict=True) if moved
        ]
        placements = dict(zip(self.placed, layers, strict=True))
        return Plan(number, placements, tuple(changed), self.predictor.error)

    def _worth_moving(self, expected_LNE: Tensor, owner_LE: Tensor, number: int) -> Tensor:
        if self.config.planner == "random":
            return shuffled_owners(owner_LE, self._seed, number)
        interval, state_bytes = self.config.move_owners_every, self.costs.expert_bytes * 3
        return move_owners(
            self.setup, expected_LNE, owner_LE, interval_steps=interval, state_bytes=state_bytes
        ).owner_LE


def pool_layout(mesh: FoldedMesh) -> dict[str, int]:
    """How the ranks of an expert pool are grouped; a node with no whole number of groups counts as one for each."""
    num_groups, num_shards = mesh.edp * mesh.ep, mesh.etp
    per_node, rest = divmod(min(mesh.ranks_per_node, mesh.pool_size), num_shards)
    fits = rest == 0 and per_node > 0 and num_groups % per_node == 0
    return {"groups": num_groups, "shards": num_shards, "groups per node": per_node if fits else 1}


def held_by_owners(layers: Sequence[int], owner_LE: Tensor, like: Placement) -> dict[int, Placement]:
    """Each expert held by its owner alone."""
    one_each = torch.arange(like.num_experts + 1, dtype=torch.int32)
    ones = torch.ones(like.num_experts, dtype=torch.int32)
    return {
        layer: Placement(like.num_groups, owner_E.unsqueeze(1), one_each, owner_E, ones, num_shards=like.num_shards)
        for layer, owner_E in zip(layers, owner_LE.contiguous(), strict=True)
    }


def shuffled_owners(owner_LE: Tensor, seed: int, number: int) -> Tensor:
    """Other owners, drawn: each layer's present ones exchanged among its experts."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.stack([owner_E[torch.randperm(len(owner_E), generator=rng)] for owner_E in owner_LE])
