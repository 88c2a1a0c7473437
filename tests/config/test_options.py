"""What help and documentation say of every field, and that they say it of all."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from moetrain.cli.train import main
from moetrain.config import ATTENTION_AXES, EXPERT_AXES, NotBuiltYetError, RunConfig, load_run, options_help
from moetrain.config.options import RUN, dashed, groups, options

ROOT = Path(__file__).parents[2]
WIDTHS = (80, 120)
# Numbers of no unit: ratios, rates and seeds.
PURE = {
    "seed", "data.domain_weights", "model.rope_theta", "model.norm_eps", "model.init_std",
    "sequence.offload", "router.weight_scale",
    "balance.coef",
    "balance.z_loss_coef", "balance.bias_rate", "dispatch.capacity_factor", "optim.lr", "optim.min_lr_ratio",
    "optim.beta1", "optim.beta2", "optim.eps", "optim.weight_decay", "optim.clip_norm",
}  # fmt: skip


def is_number(kind: object) -> bool:
    return bool({int, float} & {kind, *get_args(kind)})


@pytest.mark.parametrize("name", options())
def test_every_field_has_a_sentence_a_unit_and_bounds(name: str) -> None:
    option = options()[name]
    text = option.about.text
    assert re.fullmatch(r"[A-Z`][^\n]{10,}\.", text), "one sentence that begins with a capital and ends with a period"
    assert ". " not in text, "one sentence"
    if is_number(option.kind):
        assert option.about.bounds, "a number has legal values"
        assert (name in PURE) == (not option.about.unit), "a number has a unit, or is listed as having none"
    else:
        assert not option.about.unit


@pytest.mark.parametrize("name", [name for name, option in options().items() if option.choices])
def test_help_does_not_promise_a_choice_that_is_not_built(name: str) -> None:
    refused = []
    for choice in options()[name].choices:
        try:
            load_run([f"--{dashed(name)}", choice])
        except NotBuiltYetError:
            refused.append(choice)
    assert bool(refused) == ("not built yet" in options()[name].about.text)


@pytest.mark.parametrize("name", [name for name, option in options().items() if option.about.bounds])
def test_what_help_says_is_legal_is_what_is_checked(name: str) -> None:
    """Just outside each bound is refused by the field's name, and the default is not."""
    about, kind = options()[name].about, options()[name].kind
    given = "a={}" if kind == dict[str, float] else "{}"
    step = 1 if int in (kind, *get_args(kind)) else 1e-9
    outside = [
        *([about.least - step] if about.least is not None else []),
        *([about.most + step * max(1, about.most)] if about.most is not None else []),
        *([about.above] if about.above is not None else []),
        *([about.below] if about.below is not None else []),
    ]
    assert outside
    for value in outside:
        text = given.format(int(value) if step == 1 else value)
        with pytest.raises(ValueError, match=f"^{re.escape(name)}"):
            load_run([f"--{dashed(name)}={text}"])


@pytest.mark.parametrize("width", WIDTHS)
def test_help_has_every_option_once_within_the_width(width: int) -> None:
    text = options_help(width=width)
    assert max(map(len, text.splitlines())) <= width
    for name, option in options().items():
        assert len(re.findall(rf"^  --{re.escape(dashed(name))} ", text, re.MULTILINE)) == 1
        assert option.about.text in " ".join(text.split())
    assert [line.partition(":")[0] for line in text.splitlines() if re.match(r"\w+: ", line)] == list(groups())


def test_help_says_type_unit_bounds_default_and_meaning() -> None:
    lines = options_help("moe").splitlines()
    place = lines.index("  --moe.top-k INT (experts, at least 1; default 4)")
    assert lines[place + 1] == "      Experts that each token is sent to (K), at most num_experts."
    assert "  --dispatch.tile INT (rows, 1 to 65,536; default 128)" in options_help("dispatch").splitlines()
    assert "  --router.score softmax|topk_softmax|sigmoid (default softmax)" in options_help("router").splitlines()
    assert "  --mesh.edp INT|none (ranks, at least 1; default none)" in options_help("mesh").splitlines()
    assert "  --optim.beta1 FLOAT (at least 0 and below 1; default 0.9)" in options_help("optim").splitlines()


@pytest.mark.parametrize("group", groups())
def test_one_group_shows_its_options_alone(group: str) -> None:
    shown = re.findall(r"^  --([\w.-]+) ", options_help(group), re.MULTILINE)
    expected = [dashed(name) for name, option in options().items() if option.group == group]
    assert shown == ([*("preset", "config", "steps", "from"), *expected] if group == RUN else expected)
    assert expected


@pytest.mark.parametrize("arguments", [["--help", "moe"], ["--help=moe"], ["-h", "moe"], ["-h=moe"]])
def test_the_command_shows_one_group(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("moe: Experts of an MoE layer")
    assert "--router" not in out
    assert main(["-h", "--train.steps", "3"]) == 0
    assert capsys.readouterr().out.startswith("usage: moetrain train")


def test_an_unknown_group_lists_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help", "rooter"], ["--help=rooter"]):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert "'rooter'; did you mean 'router'?" in err
        assert all(repr(group) in err for group in groups())
    assert main(["--help="]) == 2
    assert "--help must be one of 'run'" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from moetrain.cli.main import main; main(['train', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60).returncode == 0


def test_groups_are_the_tables_and_what_stands_in_none() -> None:
    assert set(groups()) == {RUN, *(option.group for option in options().values())}
    assert [name for name, option in options().items() if option.group == RUN] == ["seed", "run_dir"]


def test_the_axes_are_the_meshs_fields() -> None:
    axes = [*ATTENTION_AXES, *EXPERT_AXES[1:]]
    assert [name.removeprefix("mesh.") for name in options() if name.startswith("mesh.")][: len(axes)] == axes


def test_defaults_are_those_of_a_run_without_options() -> None:
    run = RunConfig()
    assert options()["moe.top_k"].default == run.moe.top_k
    assert options()["run_dir"].default == run.run_dir


def test_the_configuration_page_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "configuration.py"))
    assert page["PAGE"].read_text() == page["page"](), page["CURE"]


@pytest.mark.parametrize(
    ("args", "kind", "sentence"),
    [
        (["--moe.topk", "2"], ValueError, "did you mean --moe.top-k? Experts that each token is sent to"),
        (["--prset", "tiny"], ValueError, "did you mean --preset? Where to start from"),
        (["--train.steps", "soon"], TypeError, "(train.steps: Optimizer steps of the whole run.)"),
        (["--balance.scope", "last"], ValueError, "(balance.scope: Load that the balance loss sees"),
    ],
)
def test_errors_say_what_the_field_is(args: list[str], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=re.escape(sentence)):
        load_run(args)
