"""Old spellings of moved fields: understood everywhere, said once, refused beside the new one."""

import logging
from pathlib import Path

import pytest

from moetrain.config import load_run, preset, run_from_dict, to_dict
from moetrain.config.load import read_toml
from moetrain.config.moved import MOVED
from moetrain.config.options import options

# As commit 8ad8183 wrote them: the moe tables of a config.toml and of a checkpoint's JSON.
OLD_TOML = """
[moe]
num_experts = 8
top_k = 2
expert_width = 32
activation = "swiglu"
num_shared_experts = 0
shared_gate = false
score = "sigmoid"
renormalise = true
weight_scale = 2.5
num_groups = 2
groups_kept = 1
group_rule = "max"
loss_free = true
bias_rate = 0.01
balance_scope = "micro"
balance_coef = 0.02
z_loss_coef = 0.0
num_null_experts = 0
capacity_factor = 1.25
capacity_by = "position"
pad_to_capacity = true
dispatch_pieces = 2
rounding = "none"
tile = 64
expert_biases = false
recompute_hidden = false
"""
OLD_DICT = {
    "moe": {
        "num_experts": 8, "top_k": 2, "expert_width": 32, "score": "sigmoid", "weight_scale": 2.5, "num_groups": 2,
        "groups_kept": 1, "group_rule": "max", "loss_free": True, "bias_rate": 0.01, "balance_scope": "micro",
        "balance_coef": 0.02, "z_loss_coef": 0.0, "capacity_factor": 1.25, "capacity_by": "position",
        "pad_to_capacity": True, "dispatch_pieces": 2, "tile": 64,
    }
}  # fmt: skip
NEW_DICT = {
    "moe": {"num_experts": 8, "top_k": 2, "expert_width": 32},
    "router": {"score": "sigmoid", "weight_scale": 2.5, "num_groups": 2, "groups_kept": 1, "group_rule": "max"},
    "balance": {"scope": "micro", "coef": 0.02, "z_loss_coef": 0.0, "loss_free": True, "bias_rate": 0.01},
    "dispatch": {
        "capacity_factor": 1.25, "capacity_by": "position", "pad_to_capacity": True, "pieces": 2, "tile": 64,
    },
}  # fmt: skip


def test_every_moved_field_is_a_field_and_no_old_spelling_is() -> None:
    assert set(MOVED.values()) < set(options())
    assert not set(MOVED) & set(options())


def test_an_old_file_and_an_old_checkpoint_are_the_run_they_were(tmp_path: Path) -> None:
    file = tmp_path / "old.toml"
    file.write_text(OLD_TOML)
    expected = run_from_dict(NEW_DICT)
    assert load_run(["--config", str(file)]) == expected
    assert run_from_dict(read_toml(file)) == expected
    assert run_from_dict(OLD_DICT) == expected
    assert run_from_dict(to_dict(expected)) == expected


def test_a_file_is_told_all_its_old_spellings_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "old.toml"
    file.write_text("[moe]\nscore = 'sigmoid'\nbalance_coef = 0.1\n")
    with caplog.at_level(logging.WARNING):
        run = load_run(["--config", str(file)])
    assert (run.router.score, run.balance.coef) == ("sigmoid", 0.1)
    assert caplog.messages == [
        f"{file}: moe.score is now router.score, moe.balance_coef is now balance.coef; the old spellings work in this "
        "version"
    ]


def test_a_hint_names_the_first_few_and_counts_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "old.toml"
    file.write_text(OLD_TOML)
    load_run(["--config", str(file)])
    (line,) = caplog.messages
    assert line.count(" is now ") == 4
    assert (
        f", and {len(MOVED) - 4} more have moved (docs/configuration.md has the list); the old spellings work" in line
    )


def test_what_the_program_wrote_itself_is_read_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The next checkpoint, and the run folder's file as the run goes on, have the new spelling anyway."""
    file = tmp_path / "config.toml"
    file.write_text(OLD_TOML)
    read_toml(file)
    run_from_dict(OLD_DICT)
    assert caplog.messages == []


@pytest.mark.parametrize("option", ["--moe.score", "--moe.score="])
def test_the_command_line_understands_and_says(option: str, caplog: pytest.LogCaptureFixture) -> None:
    given = [option + "sigmoid"] if option.endswith("=") else [option, "sigmoid"]
    assert load_run(["--preset", "tiny", *given]) == load_run(["--preset", "tiny", "--router.score", "sigmoid"])
    assert caplog.messages == ["moe.score is now router.score; the old spelling works in this version"]


def test_a_file_of_the_old_spelling_yields_to_an_option_of_the_new(tmp_path: Path) -> None:
    file = tmp_path / "old.toml"
    file.write_text("[moe]\ndispatch_pieces = 2\n")
    assert load_run(["--config", str(file), "--dispatch.pieces", "3"]).dispatch.pieces == 3


@pytest.mark.parametrize("order", [1, -1])
def test_both_spellings_are_refused_by_name(order: int, tmp_path: Path) -> None:
    both = ["--moe.balance-coef=0.1", "--balance.coef=0.2"][::order]
    with pytest.raises(ValueError, match=r"^the command line gives both moe\.balance_coef and balance\.coef, the old"):
        load_run(both)
    file = tmp_path / "both.toml"
    tables = ["[moe]\nbalance_coef = 0.1\n", "[balance]\ncoef = 0.1\n"][::order]
    file.write_text("".join(tables))
    with pytest.raises(ValueError, match=r"both.toml gives both moe\.balance_coef and balance\.coef.*; keep balance"):
        load_run(["--config", str(file)])
    with pytest.raises(ValueError, match=r"^the configuration gives both moe\.tile and dispatch\.tile"):
        run_from_dict({"moe": {"tile": 8}, "dispatch": {"tile": 8}})


def test_an_error_in_an_old_spelling_names_the_new_one() -> None:
    with pytest.raises(ValueError, match=r"^dispatch\.tile must be between 1 and 65536, got 0"):
        load_run(["--moe.tile", "0"])
    with pytest.raises(TypeError, match=r"^balance\.coef must be float, got 'much'"):
        load_run(["--moe.balance-coef", "much"])


def test_an_old_table_beside_no_table_is_refused_as_before() -> None:
    with pytest.raises(ValueError, match="router must be a table, got 3"):
        run_from_dict({"moe": {"score": "softmax"}, "router": 3})


def test_the_values_given_are_not_changed() -> None:
    values = to_dict(preset("tiny")) | {"moe": {"tile": 8}}
    values.pop("dispatch")
    run_from_dict(values)
    assert values["moe"] == {"tile": 8}
    assert "dispatch" not in values
