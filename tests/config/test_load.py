"""A run from preset, file and options: who has the last word, and what every mistake is told."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from work import counted_lines, run_and_list_packages

from moetrain.config import (
    DataConfig,
    MoEConfig,
    NotBuiltYetError,
    RunConfig,
    load_run,
    preset,
    run_from_dict,
    to_dict,
    to_toml,
)

# (options, kind of error, words that its text must hold: field, value, cure)
INVALID_OPTIONS = [
    (["--moe.topk", "4"], ValueError, ["--moe.topk", "did you mean --moe.top-k?"]),
    (["--top-k", "4"], ValueError, ["--top-k", "did you mean --moe.top-k?"]),
    (["--step", "4"], ValueError, ["--step", "did you mean --steps?"]),
    (["--model.with", "64"], ValueError, ["--model.with", "did you mean --model.width?"]),
    (["--data.top-k", "64"], ValueError, ["--data.top-k", "did you mean --moe.top-k?"]),
    (["--mesh.dp", "2"], ValueError, ["--mesh.dp;", "did you mean --mesh.dp-replicate or --mesh.dp-shard?"]),
    (
        ["--batch", "4"],
        ValueError,
        ["--batch;", "did you mean --data.global-batch, --data.micro-batch or --data.batch-tokens?"],
    ),
    (["--moe.balance-coeff", "1"], ValueError, ["--moe.balance-coeff;", "did you mean --balance.coef?"]),
    (["--zzz", "4"], ValueError, ["--zzz;", "see --help for all"]),
    (["steps=4"], ValueError, ["steps=4", "--train.steps 300"]),
    (["--steps"], ValueError, ["--train.steps", "must have a value", "write --train.steps VALUE"]),
    (["--steps", "many"], TypeError, ["train.steps", "must be int", "'many'", "a whole number"]),
    (["--steps", "1.5"], TypeError, ["train.steps", "must be int", "'1.5'", "a whole number"]),
    (["--optim.lr", "fast"], TypeError, ["optim.lr", "must be float", "'fast'", "a number such as 0.1"]),
    (["--optim.lr", "nan"], ValueError, ["optim.lr", "finite", "nan", "in digits"]),
    (["--optim.lr", "inf"], ValueError, ["optim.lr", "finite", "inf", "in digits"]),
    (["--train.overwrite", "maybe"], ValueError, ["train.overwrite", "true or false", "'maybe'"]),
    (["--data.domain-weights", "python"], ValueError, ["data.domain_weights", "'python'", "a=1,b=2"]),
    (["--data.domain-weights", "python=x"], TypeError, ["data.domain_weights['python']", "'x'", "a number"]),
    (["--data.domain-weights", "a=0"], ValueError, ["data.domain_weights", "positive sum", "above 0"]),
    (["--preset", "quikstart"], ValueError, ["preset", "'quikstart'", "did you mean 'quickstart'?"]),
    (["--config", "/no/such.toml"], ValueError, ["config file", "/no/such.toml", "check the path"]),
    (["--moe.top-k", "17"], ValueError, ["moe.top_k (17)", "moe.num_experts (16)", "lower moe.top_k"]),
    (["--router.num-groups", "3"], ValueError, ["router.num_groups (3)", "moe.num_experts (16)", "use 1"]),
    (["--router.num-groups", "4", "--router.groups-kept", "5"], ValueError, ["router.groups_kept (5)", "lower it"]),
    (["--router.num-groups", "8"], ValueError, ["moe.top_k (4)", "the 2 experts", "raise router.groups_kept"]),
    (["--moe.activation", "swigloo"], ValueError, ["moe.activation", "'swigloo'", "did you mean 'swiglu'?"]),
    (["--router.score", "sigmoidal"], ValueError, ["router.score", "'sigmoidal'", "did you mean 'sigmoid'?"]),
    (["--moe.shared-gate"], ValueError, ["moe.shared_gate", "no shared expert", "set moe.shared_width"]),
    (["--moe.shared-width", "8", "--moe.num-shared-experts", "1"], ValueError, ["moe.shared_width (8)", "only one"]),
    (
        ["--balance.bias-rate", "2"],
        ValueError,
        ["balance.bias_rate", "between 0.0 and 1.0", "2.0", "inside that range"],
    ),
    (["--model.num-kv-heads", "3"], ValueError, ["model.num_kv_heads (3)", "num_heads (8)", "a divisor of 8"]),
    (["--model.head-dim", "33"], ValueError, ["model.head_dim", "even", "33", "use 34"]),
    (["--model.width", "0"], ValueError, ["model.width", "at least 1", "got 0", "set it to 1 or more"]),
    (["--model.dense-first", "5"], ValueError, ["model.dense_first", "between 0 and 4", "got 5"]),
    (["--data.seq-len", "1"], ValueError, ["data.seq_len", "at least 2", "got 1"]),
    (["--data.global-batch", "0"], ValueError, ["data.global_batch", "at least 1", "got 0"]),
    (["--optim.lr", "0"], ValueError, ["optim.lr", "positive", "got 0.0", "3e-3"]),
    (["--optim.beta2", "1"], ValueError, ["optim.beta2", "at least 0 and below 1", "got 1.0", "0.95"]),
    (["--optim.name", "adam"], ValueError, ["optim.name", "'adam'", "did you mean 'adamw'?"]),
    (["--steps", "10"], ValueError, ["optim.warmup_steps (20)", "train.steps (10)", "lower optim.warmup_steps"]),
    (["--train.dtype", "float16"], ValueError, ["train.dtype", "'float16'", "did you mean 'bfloat16'?"]),
    (["--seed", "-1"], ValueError, ["seed", "at least 0", "got -1"]),
    (["--mesh.ep", "0"], ValueError, ["mesh.ep", "at least 1", "got 0"]),
    (
        ["--sequence.planner", "moetrain", "--dispatch.pad_to_capacity", "true", "--dispatch.capacity_factor", "1"],
        ValueError,
        ["ranks may share rows (sequence.planner moetrain)", "dispatch.pad_to_capacity to false"],
    ),
    (["--mesh.pp", "2"], NotBuiltYetError, ["mesh.pp = 2", "not built yet", "set mesh.pp to 1"]),
    (["--mesh.cp", "2"], ValueError, ["mesh.cp (2)", "the planner is data", "set sequence.planner to context"]),
    (["--mesh.cp", "2", "--sequence.planner", "moetrain"], ValueError, ["mesh.cp (2)", "set mesh.cp to 1"]),
    (["--sequence.capacity", "9"], ValueError, ["sequence.capacity (9)", "rounds are filled by rows", "leave it out"]),
    (
        ["--data.packing", "documents", "--data.context", "99", "--sequence.capacity", "98"],
        ValueError,
        ["sequence.capacity (98) must hold", "one of up to 99 tokens, 99", "sequence.planner to moetrain"],
    ),
    (
        ["--sequence.planner", "moetrain", "--balance.scope", "micro"],
        ValueError,
        ["balance.scope micro", "under sequence.planner moetrain ranks share", "set balance.scope to lagged"],
    ),
    (
        [
            *("--mesh.cp", "2", "--sequence.planner", "context", "--dispatch.pad_to_capacity", "true"),
            *("--dispatch.capacity_factor", "1"),
        ],
        ValueError,
        ["dispatch.pad_to_capacity", "where its documents end", "set data.packing to documents"],
    ),
    (["--mesh.pp", "2"], NotBuiltYetError, ["mesh.pp = 2", "not built yet", "set mesh.pp to 1"]),
    (["--model.attention", "mla"], NotBuiltYetError, ["model.attention = 'mla'", "not built yet", "'gqa'"]),
    (["--balance.scope", "buffer"], NotBuiltYetError, ["balance.scope = 'buffer'", "'lagged'"]),
    (
        ["--dispatch.capacity-factor", "-1.5"],
        ValueError,
        ["dispatch.capacity_factor must be positive", "1.25 is usual"],
    ),
    (
        ["--dispatch.pad-to-capacity"],
        ValueError,
        ["dispatch.pad_to_capacity needs a bound", "set dispatch.capacity_factor, 1.25"],
    ),
    (["--dispatch.pieces", "0"], ValueError, ["dispatch.pieces", "at least 1", "got 0"]),
    (["--moe.num-null-experts", "2"], NotBuiltYetError, ["moe.num_null_experts = 2", "set it to 0"]),
    (
        ["--dispatch.rounding", "nearby"],
        ValueError,
        ["dispatch.rounding must be one of 'none', 'nearest'", "did you mean 'nearest'?"],
    ),
    (["--dispatch.tile", "0"], ValueError, ["dispatch.tile must be between 1 and 65536, got 0", "128"]),
    (["--moe.expert-biases"], NotBuiltYetError, ["moe.expert_biases = True", "no biases"]),
    (["--run-dir", "a\udcffb"], ValueError, ["run_dir must be text in UTF-8", r"'a\udcffb'", "choose another"]),
    (["--data.path", "\udc80"], ValueError, ["data.path must be text in UTF-8", r"'\udc80'", "choose another"]),
    (["--data.domain-weights", "\udc80=1"], ValueError, ["data.domain_weights must be text", r"'\udc80'"]),
]

INVALID_TOML = [
    ("[moe]\ntopk = 4", ValueError, ["unknown key 'moe.topk'", "did you mean 'moe.top_k'?"]),
    ("steps = 4", ValueError, ["unknown key 'steps'", "did you mean 'train.steps'?"]),
    ("[modl]\nwidth = 4", ValueError, ["unknown key 'modl'", "did you mean the table [model]?"]),
    ("[moe.router]\nscore = 'softmax'", ValueError, ["unknown key 'moe.router'", "did you mean the table [router]?"]),
    ("[moe]\ntop_k = '4'", TypeError, ["moe.top_k", "must be int", "'4'", "without quotes"]),
    ("[moe]\ntop_k = 'four'", TypeError, ["moe.top_k", "must be int", "'four' (str); write a whole number such as 4"]),
    ("[moe]\ntop_k = 4.0", TypeError, ["moe.top_k", "must be int", "4.0 (float); write 4 ("]),
    ("[moe]\ntop_k = 4.5", TypeError, ["moe.top_k", "must be int", "4.5 (float); write a whole number"]),
    ("[moe]\ntop_k = inf", TypeError, ["moe.top_k", "must be int", "inf (float); write a whole number"]),
    ("[moe]\ntop_k = true", TypeError, ["moe.top_k", "must be int", "True (bool); write a whole number"]),
    ("[moe]\ntop_k = [4]", TypeError, ["moe.top_k", "must be int", "[4] (list); write a whole number"]),
    ("[moe.top_k]\nx = 4", TypeError, ["moe.top_k", "must be int", "{'x': 4} (dict); write a whole number"]),
    ("[optim]\nlr = true", TypeError, ["optim.lr", "must be float", "True (bool); write a number such as 0.1"]),
    ("[optim]\nlr = '1e-3'", TypeError, ["optim.lr", "must be float", "'1e-3' (str); write it without quotes"]),
    ("[optim]\nlr = 'fast'", TypeError, ["optim.lr", "must be float", "'fast' (str); write a number such as 0.1"]),
    ("[train]\noverwrite = 1", TypeError, ["train.overwrite", "must be bool", "1 (int); write true or false"]),
    ("[train]\noverwrite = 'yes'", TypeError, ["train.overwrite", "must be bool", "(str); write true or false"]),
    ("[train]\noverwrite = 'true'", TypeError, ["train.overwrite", "must be bool", "write it without quotes"]),
    ("[train]\ndtype = 32", TypeError, ["train.dtype", "must be str", "32 (int); write it in quotes"]),
    ("[router]\nscore = ['softmax']", TypeError, ["router.score", "must be str", "(list); write one text in quotes"]),
    ("[moe]\nscore = 3", TypeError, ["router.score must be str, got 3 (int); write it in quotes"]),
    ("[data]\npath = 3", TypeError, ["data.path", "must be str", "3 (int); write it in quotes"]),
    ("[data]\ndomain_weights = 3", TypeError, ["must be dict, got 3", "write it as the table [data.domain_weights]"]),
    (
        "'moe.top_k' = 1",
        ValueError,
        ["unknown key 'moe.top_k'", "write moe.top_k without quotes, or top_k below [moe]"],
    ),
    ("moe = 3", ValueError, ["moe must be a table", "3", "write [moe]"]),
    ("preset = 3", TypeError, ["preset", "must be str", "3 (int); write it in quotes"]),
    ("[moe\n", ValueError, ["must be TOML", "line 1", "correct that line"]),
    ("seed = 1" + "0" * 5000, ValueError, ["config file", "must be TOML", "4300 digits", "; correct it"]),
    ('run_dir = "a\\u0000b"', ValueError, ["run_dir must be text", "without NUL", r"'a\x00b'"]),
    ("[optim]\nlr = inf", ValueError, ["optim.lr", "finite", "inf"]),
    ("[data.domain_weights]\npython = 'x'", TypeError, ["data.domain_weights['python']", "'x'"]),
]


MOST_LINES = 40_000  # of Python, to find out what is wrong: the longest search for a name alike takes a quarter


def _assert_refused(args: list[str], kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as caught, counted_lines() as lines:
        load_run(args)
    assert type(caught.value) is kind
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
    assert 0 < lines.count < MOST_LINES


@pytest.mark.parametrize(("args", "kind", "words"), INVALID_OPTIONS, ids=lambda value: str(value)[:60])
def test_invalid_options_are_refused(args: list[str], kind: type[Exception], words: list[str]) -> None:
    _assert_refused(args, kind, words)


@pytest.mark.parametrize(("text", "kind", "words"), INVALID_TOML, ids=lambda value: str(value)[:30])
def test_invalid_toml_is_refused(text: str, kind: type[Exception], words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    _assert_refused(["--config", str(file)], kind, words)


def test_what_is_no_config_file_is_named_as_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, sentence in {
        "": f"config file must be a file, got the folder '{tmp_path}'; name a file in it",
        "none": f"config file must exist, got '{tmp_path}/none'; check the path",
        "pipe": f"config file must be a regular file, got '{tmp_path}/pipe'; copy it to one",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            load_run(["--config", str(tmp_path / name)])


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"\xff", "0xff at line 1, column 1"),
        ("seed = 1\n".encode("utf-16"), "0xff at line 1, column 1"),
        (b"seed = 1\n# \xc3\xa4 \xe4\n", "0xe4 at line 2, column 5"),
        (b"seed = 1\r\n\r\n\x80", "0x80 at line 3, column 1"),
        (b"# \xe2\x82", "0xe2 at line 1, column 3"),
    ],
)
def test_a_byte_that_is_no_utf_8_is_found(content: bytes, where: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    sentence = f"config file '{file}' must be text in UTF-8, got byte {where}; save it as UTF-8"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        load_run(["--config", str(file)])


def test_the_cure_names_a_line_where_the_reader_of_toml_does(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("seed = [1,")
    with pytest.raises(ValueError, match=r"\(at end of document\); correct it$"):
        load_run(["--config", str(file)])


def test_loading_imports_nothing_of_others() -> None:
    code = (
        "import sys; before = set(sys.modules); from moetrain.config import load_run\n"
        "try: load_run(['--moe.top-k', '99'])\n"
        "except ValueError as error: print(error)\n"
        "new = set(sys.modules) - before\n"
        "print({name.partition('.')[0] for name in new} - sys.stdlib_module_names)\n"
        "print({name.split('.')[1] for name in new if name.startswith('moetrain.')})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [
        "moe.top_k (99) must be at most moe.num_experts (16); lower moe.top_k",
        "{'moetrain'}",
        "{'config'}",
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--moe.top-k", "99"], ["moe.top_k (99)", "moe.num_experts (16)", "lower moe.top_k"]),
        (["--moe.topk", "2"], ["--moe.topk", "did you mean --moe.top-k?"]),
        (["--mesh.ep", "2"], ["ep=2", "number of ranks, 1", "nearest legal axes: edp=1 ep=1 etp=1"]),
        (["--preset", "kimi-k2"], ["model.attention = 'mla'", "not built yet", "gqa"]),
    ],
)
def test_the_command_line_refuses_before_it_imports_torch(args: list[str], words: list[str]) -> None:
    code, _, said, packages = run_and_list_packages("train", *args)
    assert (code, packages) == (2, ["moetrain", "numpy"])
    assert "Traceback" not in said
    assert all(word in said for word in words), said


def test_options_win_over_file_and_file_over_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "tiny"\nseed = 7\n[moe]\ntop_k = 3\nnum_experts = 6\n[data]\npath = "here"\n')
    run = load_run(["--config", str(file), "--moe.top-k", "4", "--train.overwrite", "--optim.lr=1"])
    assert (run.moe.top_k, run.moe.num_experts, run.seed) == (4, 6, 7)
    assert (run.model.width, run.data.path) == (preset("tiny").model.width, Path("here"))
    assert run.train.overwrite is True
    assert run.optim.lr == 1.0
    assert isinstance(run.optim.lr, float)
    assert load_run(["--config", str(file), "--preset", "quickstart"]).model.width == 256


def test_only_the_joined_whole_must_be_valid(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[moe]\ntop_k = 20\n")
    assert load_run(["--config", str(file), "--moe.num-experts", "32"]).moe.top_k == 20


def test_plain_defaults_and_default_preset() -> None:
    assert load_run() == RunConfig()
    assert load_run(default_preset="tiny") == preset("tiny")
    assert load_run(["--preset", "quickstart"], default_preset="tiny") == preset("quickstart")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--preset", "tiny", "--moe.shared-width", "7", "--mesh.edp", "2"],
        ["--preset", "qwen3-30b-a3b", "--optim.lr", "1e-7", "--balance.coef", "0"],
        ["--data.domain-weights", "a b=1,c.d=2.5", "--run-dir", 'odd "name"/\\x', "--data.path", "ä"],
    ],
)
def test_toml_and_dict_bring_the_same_run_back(args: list[str], tmp_path: Path) -> None:
    run = load_run(args)
    file = tmp_path / "saved.toml"
    file.write_text(to_toml(run), encoding="utf-8")
    assert load_run(["--config", str(file)]) == run
    assert run_from_dict(to_dict(run)) == run
    assert load_run(["--config", str(file), "--seed", "99"]) != run


@pytest.mark.parametrize("code", [*range(1, 0xA0), 0xAD, 0x2028, 0xFEFF, 0xFFFF, 0x1F600], ids=hex)
def test_every_character_of_a_name_comes_back(code: int, tmp_path: Path) -> None:
    name = f"a{chr(code)}b"
    run = replace(RunConfig(), run_dir=Path(name), data=DataConfig(path=Path(name), domain_weights={name: 2.0}))
    file = tmp_path / "saved.toml"
    file.write_text(to_toml(run), encoding="utf-8")
    assert load_run(["--config", str(file)]) == run


def test_none_takes_a_value_back(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[moe]\nshared_width = 64\n")
    run = load_run(["--config", str(file), "--moe.shared-width", "none", "--moe.num-shared-experts", "2"])
    assert (run.moe.shared_width, run.moe.shared_hidden) == (None, 2 * MoEConfig().expert_width)


def test_domain_weights_are_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[data.domain_weights]\npython = 1\nman = 2.5\n")
    assert load_run(["--config", str(file)]).data.domain_weights == {"python": 1.0, "man": 2.5}
    assert load_run(["--config", str(file), "--data.domain-weights", "c=3"]).data.domain_weights == {"c": 3.0}


@pytest.mark.parametrize("values", [{"moe": {"topk": 1}}, {"mo": {}}])
def test_unknown_dictionary_keys_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="unknown key"):
        run_from_dict(values)
