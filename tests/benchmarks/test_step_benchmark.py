"""What bench_step.py is built of: names of time, and the model that transformers trains beside ours."""

from types import SimpleNamespace

import pytest
import torch
from hf_step import HuggingFaceLoop, Layout, foreign_name, layouts, refuse_foreign_features
from ranks import run_on_ranks
from step_contest import by_row, our_step, rows_of
from step_profile import BUCKETS, EXPERTS_RANGE, bucket, expert_sequence_numbers
from train.tiny_run import make_engine

from moetrain.config.load import load_run
from moetrain.config.presets import PRESETS


def event(name: str, parent: SimpleNamespace | None = None, number: int = -1) -> SimpleNamespace:
    return SimpleNamespace(name=name, cpu_parent=parent, sequence_nr=number)


def test_time_goes_to_the_outermost_name() -> None:
    linear = event("aten::linear")
    assert bucket(event("aten::mm", linear), set()) == "dense matmul"
    assert bucket(event("aten::mm", event("moetrain::grouped_gemm")), set()) == "experts"
    assert bucket(event("moetrain::route"), set()) == "routing"
    assert bucket(event("moetrain::gather_rows"), set()) == "rows"
    assert bucket(event("moetrain::causal_attention_backward"), set()) == "attention"
    assert bucket(event("moetrain::attend_backward_"), set()) == "attention"
    assert bucket(event("aten::_flash_attention_forward"), set()) == "attention"
    assert bucket(event("moetrain::rms_norm_backward"), set()) == "norm"
    assert bucket(event("aten::silu"), set()) == "rest"
    assert bucket(event("moetrain::expert_mlp_backward"), set()) == "experts"


def test_experts_take_their_elementwise_work_and_its_backward() -> None:
    inside = event("aten::silu", event(EXPERTS_RANGE), number=7)
    outside = event("aten::silu", number=8)
    experts = expert_sequence_numbers([inside, outside])
    assert experts == {7}
    assert bucket(inside, experts) == "experts"
    backward = event("autograd::engine::evaluate_function: SiluBackward0", number=7)
    assert bucket(event("aten::silu_backward", backward), experts) == "experts"
    other = event("autograd::engine::evaluate_function: SiluBackward0", number=8)
    assert bucket(event("aten::silu_backward", other), experts) == "rest"
    assert "experts" in BUCKETS


def test_parameters_have_foreign_names() -> None:
    assert foreign_name("embed.weight") == "model.embed_tokens.weight"
    assert foreign_name("lm_head.weight") == "lm_head.weight"
    assert foreign_name("layers.11.attn.k_norm.weight") == "model.layers.11.self_attn.k_norm.weight"
    assert foreign_name("layers.3.moe.experts.w_in") == "model.layers.3.mlp.experts.gate_up_proj"


def test_a_model_that_transformers_computes_otherwise_is_refused() -> None:
    refuse_foreign_features(PRESETS["quickstart"]())
    with pytest.raises(
        ValueError, match=r"--peer hf: moe\.activation must be 'swiglu' .*, got 'gelu'; leave --peer out"
    ):
        refuse_foreign_features(load_run(["--preset", "tiny", "--moe.activation", "gelu"]))


def test_only_layouts_that_fit_are_tried() -> None:
    run = PRESETS["quickstart"]()
    names, both = ("eager", "grouped_mm"), (torch.bfloat16, torch.float32)
    assert layouts(run, 1, torch.float32) == [Layout(name, False, torch.float32) for name in names]
    wanted = [Layout(name, ddp, dtype) for ddp in (True, False) for dtype in both for name in names]
    assert layouts(run, 2, torch.bfloat16) == wanted
    assert Layout("batched_mm", False, torch.float32) in layouts(PRESETS["tiny"](), 1, torch.float32)


def three_steps_of_both(rank: int, world_size: int, qk_norm: bool) -> tuple[list[float], list[float]]:
    """Losses of ours and of transformers' loop where nothing but the code differs: no auxiliary loss, no decay."""
    run = load_run([
        *("--preset", "tiny", "--balance.coef", "0", "--balance.z-loss-coef", "0", "--optim.warmup-steps", "0"),
        *("--optim.min-lr-ratio", "1", "--optim.weight-decay", "0", "--train.dtype", "float64"),
        *("--model.qk-norm", str(qk_norm).lower(), "--mesh.ep", str(world_size)),
    ])  # fmt: skip
    engine = make_engine(run, world_size)
    layout = Layout("eager", world_size > 1, torch.float64)
    loop = HuggingFaceLoop(run, layout, engine.whole.parameters(), world_size)
    assert loop.num_parameters() == engine.num_parameters()
    batches = [by_row(batch, run.data.seq_len) for batch in rows_of(engine, rank)]
    return [our_step(engine) for _ in range(3)], [loop.step(batches) for _ in range(3)]


@pytest.mark.dist
@pytest.mark.parametrize(("world_size", "qk_norm"), [(1, False), (1, True), (2, False)])
def test_transformers_trains_the_same_model(world_size: int, qk_norm: bool) -> None:
    pytest.importorskip("transformers")
    losses = run_on_ranks(world_size, three_steps_of_both, world_size, qk_norm)
    ours = losses[0][0]
    theirs = [sum(step) / world_size for step in zip(*(rank[1] for rank in losses), strict=True)]
    assert ours[2] < ours[0] - 0.1
    assert theirs == pytest.approx(ours, rel=1e-5)  # transformers' norms, rotary tables and logits are float32
