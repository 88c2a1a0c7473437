from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from known import grad_of
from layer_configs import layer_config
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile
from train.tiny_run import do_step, make_engine, make_run

from moetrain.config import MeshConfig, OptimConfig
from moetrain.placement.store import ExpertStore
from moetrain.sequence.batch import PackedBatch, Piece
from moetrain.sequence.data_planner import plan_data
from moetrain.sequence.plan import Sequence
from moetrain.train import grad_norm
from moetrain.train.engine import NonFiniteGradientError
from moetrain.train.grad_norm import expert_squares

SGD = OptimConfig(name="sgd", lr=0.1, warmup_steps=0, clip_norm=0.05)
Outcome = tuple[list[tuple[float, float, float, float, int]], dict[str, Tensor], dict[str, Tensor]]


def three_steps(rank: int, corpus: Path, world_size: int, mesh: dict[str, Any], dtype: str) -> Outcome:
    run = make_run(corpus, corpus / "unused", mesh=MeshConfig(**mesh), optim=SGD, dtype=dtype)
    engine = make_engine(run, world_size)
    reports = [do_step(engine) for _ in range(3)]
    numbers = [(r.loss, r.aux, r.grad_norm, r.max_vio, r.num_loss_tokens) for r in reports]
    return numbers, engine.whole.gradients(), engine.whole.parameters()


MESHES = [
    (1, {}),
    (2, {"ep": 2}),
    (2, {"ep": 1}),
    (2, {"tp": 2, "etp": 2}),
    (4, {"ep": 2, "dp_replicate": 2}),
    (4, {"ep": 2}),
    (4, {"dp_replicate": 2, "tp": 2, "ep": 2, "etp": 2}),
]


@pytest.mark.dist
def test_every_mesh_takes_the_same_steps_and_counts_every_parameter_once(corpus: Path) -> None:
    """Parameters that two ranks hold by edp, dp_replicate or tp: counted twice, norms and clipping would differ."""
    outcomes = [
        run_on_ranks(world_size, three_steps, corpus, world_size, mesh, "float64")[0] for world_size, mesh in MESHES
    ]
    numbers, grads, params = outcomes[0]
    norm = sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
    assert norm == pytest.approx(SGD.clip_norm, rel=1e-4)  # clipped; the factor has 1e-6 in its denominator
    assert numbers[2][2] > 2 * SGD.clip_norm
    for other_numbers, other_grads, other_params in outcomes[1:]:
        for left, right in zip(numbers, other_numbers, strict=True):
            assert right == pytest.approx(left, rel=1e-10)
        assert list(other_params) == list(params)
        for name, value in params.items():
            torch.testing.assert_close(other_params[name], value, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(other_grads[name], grads[name], rtol=1e-9, atol=1e-12)


ROUTER = "layers.1.moe.router.weight"
DP, TP = {"dp_replicate": 2, "ep": 2}, {"tp": 2, "ep": 2}


def of_every_rank(store: ExpertStore, group: dist.ProcessGroup) -> Tensor:
    """Squares of all experts, as if each rank of the pool had to add them."""
    return expert_squares(store, group) * group.size()


def of_this_rank(store: ExpertStore, group: dist.ProcessGroup) -> Tensor:
    """Squares of what this rank owns: the first of the pool alone is asked."""
    owned = store.owned_parameters().values()
    return torch.stack([grad_of(one).double().square().sum() for one in owned]).sum()


FAULTS: dict[str, tuple[dict[str, Any], str, Any]] = {  # name: the mesh of two ranks, what goes wrong, and how
    "replicas twice": (DP, "counts", lambda shard, mesh, rank: True),
    "tp replicas twice": (TP, "counts", lambda shard, mesh, rank: mesh.coordinate(rank, "dp_replicate") == 0),
    "parts of one tp rank": (TP, "counts", lambda shard, mesh, rank: rank == 0),
    "experts on every rank": (DP, "expert_squares", of_every_rank),
    "experts of one rank": (DP, "expert_squares", of_this_rank),
}


def norms_with_a_fault(rank: int, corpus: Path, fault: str) -> tuple[float, float]:
    axes, name, wrong = FAULTS[fault]
    run = make_run(corpus, corpus / "unused", mesh=MeshConfig(**axes), optim=SGD, dtype="float64")
    right = do_step(make_engine(run, 2)).grad_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grad_norm, name, wrong)
        return right, do_step(make_engine(run, 2)).grad_norm


@pytest.mark.dist
@pytest.mark.parametrize("fault", FAULTS)
def test_counting_a_parameter_twice_or_not_would_show(fault: str, corpus: Path) -> None:
    whole = run_on_ranks(1, three_steps, corpus, 1, {}, "float64")[0][0][0][2]
    for right, wrong in run_on_ranks(2, norms_with_a_fault, corpus, fault):
        assert right == pytest.approx(whole, rel=1e-10)
        assert abs(wrong / whole - 1) > 1e-5  # experts, small in this model, are a ten-thousandth of it


def router_gradients(rank: int, corpus: Path, mesh: dict[str, Any], alone: bool) -> Tensor:
    """The router's gradient; ``alone``: of the tokens of one tp coordinate only."""
    run = make_run(corpus, corpus / "unused", mesh=MeshConfig(**mesh), optim=SGD, dtype="float64")
    engine = make_engine(run, dist.get_world_size())
    if alone:
        others = [shard for shard in engine.dense if shard.name != ROUTER]
        engine.share_gradients = lambda: grad_norm.sum_over_tp(others, engine.groups)  # type: ignore[method-assign]
    report = do_step(engine)
    return engine.whole.gradients()[ROUTER] / min(1.0, SGD.clip_norm / (report.grad_norm + grad_norm.EPSILON))


@pytest.mark.dist
@pytest.mark.parametrize("mesh", [{"tp": 2, "ep": 4}, {"tp": 2, "ep": 2, "etp": 2}, {"dp_replicate": 2, "tp": 2}])
def test_a_router_s_gradient_is_summed_over_every_rank_that_saw_tokens(mesh: dict[str, Any], corpus: Path) -> None:
    """Ranks along dp and tp have different tokens; each adds what its own say, and no other rank's twice."""
    whole = run_on_ranks(1, router_gradients, corpus, {}, False)[0]
    assert whole.abs().min() > 0
    for summed in run_on_ranks(4, router_gradients, corpus, mesh, False):
        torch.testing.assert_close(summed, whole, rtol=1e-9, atol=1e-13)
    for partial in run_on_ranks(4, router_gradients, corpus, mesh, True):
        assert (partial - whole).norm() > 0.1 * whole.norm()


def losses_of(rank: int, corpus: Path, options: dict[str, Any]) -> list[float]:
    engine = make_engine(make_run(corpus, corpus / "unused", mesh=MeshConfig(ep=2), **options), 2)
    return [do_step(engine).loss for _ in range(4)]


@pytest.mark.dist
def test_bfloat16_and_activation_checkpointing_stay_close(corpus: Path) -> None:
    exact = run_on_ranks(2, losses_of, corpus, {})[0]
    assert exact[-1] < exact[0] - 0.05
    assert run_on_ranks(2, losses_of, corpus, {"activation_checkpoint": True})[0] == pytest.approx(exact, rel=1e-6)
    narrow = run_on_ranks(2, losses_of, corpus, {"dtype": "bfloat16"})[0]
    assert narrow == pytest.approx(exact, rel=2e-2)
    assert narrow != exact


def steps_and_gathers(rank: int, corpus: Path, whole: bool, stale: bool) -> tuple[list[float], list[int]]:
    """Losses of three steps, and how many all-gathers each took; ``stale`` forgets to reshard after a step."""
    run = make_run(corpus, corpus / "unused", mesh=MeshConfig(ep=2), reshard_after_forward=not whole)
    engine = make_engine(run, 2)
    if stale:
        for module in engine.model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_backward(False)
                module.set_reshard_after_backward = lambda *args, **kwargs: None  # type: ignore[method-assign]
    losses, gathers = [], []
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:  # else torch 2.11 warns
            losses.append(do_step(engine).loss)
        gathers.append(sum(event.name == "c10d::_allgather_base_" for event in trace.events()))
    return losses, gathers


@pytest.mark.dist
def test_dense_parameters_kept_whole_are_gathered_once_a_step(corpus: Path) -> None:
    losses, gathers = run_on_ranks(2, steps_and_gathers, corpus, False, False)[0]
    kept, kept_gathers = run_on_ranks(2, steps_and_gathers, corpus, True, False)[0]
    assert kept == losses
    num_units = 4  # two blocks, one router, and the rest
    assert kept_gathers == [num_units] * 3
    assert min(gathers) > num_units
    stale, _ = run_on_ranks(2, steps_and_gathers, corpus, True, True)[0]
    assert stale[0] == losses[0]
    assert stale[1] != losses[1]


def round_trip(rank: int, corpus: Path) -> bool:
    engine = make_engine(make_run(corpus, corpus / "unused", mesh=MeshConfig(ep=2)), 2)
    before = engine.whole.parameters()
    wanted = {name: torch.arange(value.numel()).reshape(value.shape).to(value) for name, value in before.items()}
    engine.whole.load(wanted)
    after = engine.whole.parameters()
    changed = all(not torch.equal(before[name], after[name]) for name in wanted)
    assert before["layers.1.moe.experts.w_in"].shape == (6, 2, 24, 32)
    assert before["layers.1.moe.experts.w_out"].shape == (6, 32, 24)
    return changed and all(torch.equal(after[name], wanted[name]) for name in wanted)


@pytest.mark.dist
def test_parameters_come_back_as_they_were_loaded(corpus: Path) -> None:
    assert run_on_ranks(2, round_trip, corpus) == [True, True]


def wrong_parameters(rank: int, corpus: Path) -> None:
    engine = make_engine(make_run(corpus, corpus / "unused"), 1)
    full = engine.whole.parameters()
    with pytest.raises(
        ValueError, match=r"names must be the model's, but bogus, final_norm.weight are missing or unknown"
    ):
        engine.whole.load({("bogus" if n == "final_norm.weight" else n): v for n, v in full.items()})
    with pytest.raises(ValueError, match=r"final_norm.weight must be \[32\], got \[3\]"):
        engine.whole.load({**full, "final_norm.weight": torch.zeros(3)})
    assert engine.num_parameters() == sum(value.numel() for value in full.values())


@pytest.mark.dist
def test_wrong_parameters_are_refused_by_name(corpus: Path) -> None:
    run_on_ranks(1, wrong_parameters, corpus)


def poison(rank: int, corpus: Path) -> list[bool]:
    """Rank 1's gradient is infinite in one step, then in all."""
    run = make_run(corpus, corpus / "unused", steps=20, mesh=MeshConfig(ep=2))
    engine = make_engine(run, 2)
    engine.max_skipped_steps = 3
    broken = {"now": True}

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * float("inf") if broken["now"] and rank == 1 else gradient

    weight = dict(engine.model.named_parameters())["final_norm.weight"]
    before = engine.whole.parameters()
    weight.register_post_accumulate_grad_hook(lambda p: p.grad.copy_(spoil(p.grad)))
    first = do_step(engine)
    unchanged = all(torch.equal(before[name], value) for name, value in engine.whole.parameters().items())
    broken["now"] = False
    second = do_step(engine)
    changed = any(not torch.equal(before[name], value) for name, value in engine.whole.parameters().items())
    finite = all(value.isfinite().all() for value in engine.whole.parameters().values())
    broken["now"] = True
    do_step(engine)
    do_step(engine)
    with pytest.raises(NonFiniteGradientError, match=f"rank {rank}: the gradient norm was not finite in 3 steps"):
        do_step(engine)
    return [first.skipped, unchanged, not second.skipped, changed, bool(finite), engine.num_skipped == 4]


@pytest.mark.dist
def test_all_ranks_skip_a_step_that_is_not_finite_and_give_up_after_several(corpus: Path) -> None:
    assert run_on_ranks(2, poison, corpus) == [[True] * 6] * 2


def one_token(rank: int, corpus: Path) -> tuple[float, float]:
    """Rank 0 has one row of two tokens, rank 1 nothing at all."""
    engine = make_engine(make_run(corpus, corpus / "unused", mesh=MeshConfig(ep=2)), 2)
    plan = plan_data([Sequence(0, 2, 1)], 2, 2)
    batch = PackedBatch(torch.tensor([7, 9]), torch.tensor([9, -1]), (Piece(0, 0, 2, 0),))
    report = engine.step(plan, [batch if rank == 0 else PackedBatch.empty()])
    before = engine.whole.parameters()
    with pytest.raises(RuntimeError, match="must see the plan's 1 loss tokens in step 1, but saw 2; nothing was upd"):
        engine.step(plan, [batch])
    assert all(torch.equal(value, before[name]) for name, value in engine.whole.parameters().items())
    with pytest.raises(ValueError, match="the plan has 1 rounds but 0 micro-batches came"):
        engine.step(plan, [])
    return report.loss, report.grad_norm


@pytest.mark.dist
def test_a_rank_without_rows_takes_part(corpus: Path) -> None:
    first, second = run_on_ranks(2, one_token, corpus)
    assert first == second
    assert first[0] == pytest.approx(5.55, abs=0.3)  # log 259, before anything was learnt
    assert first[1] > 0


def repeat(rank: int, corpus: Path, seed_shift: int) -> tuple[list[float], dict[str, Tensor]]:
    run = make_run(
        corpus,
        corpus / "unused",
        steps=50,
        mesh=MeshConfig(ep=2),
        layer=layer_config(
            num_experts=6, top_k=2, expert_width=24, score="sigmoid", loss_free=True, num_shared_experts=1
        ),
    )
    engine = make_engine(run, 2)
    losses = [do_step(engine).loss for _ in range(50 if seed_shift == 0 else 3)]
    return losses, engine.whole.parameters()


@pytest.mark.dist
def test_two_runs_of_fifty_steps_differ_in_no_bit(corpus: Path) -> None:
    first, second = (run_on_ranks(2, repeat, corpus, 0, timeout=120)[0] for _ in range(2))
    assert first[0] == second[0]
    assert first[0][-1] < first[0][0] - 1.0  # it learns, so equality says something
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    assert run_on_ranks(2, repeat, corpus, 1)[0][1]["lm_head.weight"].ne(first[1]["lm_head.weight"]).any()
