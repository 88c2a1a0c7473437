"""The full product: all of it is gone through once, an interrupted run goes on, and what fails is told."""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moetrain
from moetrain.cli.verify import main as verify_main
from moetrain.cli.verify_product import main
from moetrain.testing.ranks import RankPools
from moetrain.verify.compare import RunFailedError, measure
from moetrain.verify.errors import TOLERANCE, StepErrors
from moetrain.verify.expected import Comparison
from moetrain.verify.product import progress as progress_module
from moetrain.verify.product import prove as verify_product
from moetrain.verify.product.cases import (
    AXES,
    BLOCK,
    RANKS,
    SETTINGS,
    Unit,
    case_id,
    foldings,
    refused_layouts,
    shard_of,
    units,
)
from moetrain.verify.product.progress import Outcome, Progress, fingerprint, read_outcomes
from moetrain.verify.product.prove import prove
from moetrain.verify.product.summary import as_json, summarise
from moetrain.verify.spec import VerifySpec

UNITS = list(units())
NUM_CASES = 236 * 96


def test_the_product_has_every_case_once() -> None:
    ids = [case_id(case) for unit in UNITS for case in unit.cases]
    assert len(set(ids)) == len(ids) == NUM_CASES
    shards = [shard_of(UNITS, shard, 7) for shard in range(1, 8)]
    assert Counter(unit for shard in shards for unit in shard) == Counter(UNITS)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("num_shards", [2, 3, 4, 6, 8, 10, 12, 24])
def test_every_shard_has_a_fair_part_of_every_setting(num_shards: int) -> None:
    def parts_of(units: Sequence[Unit]) -> Counter[tuple[int, object]]:
        values = ((*case, unit.dtype) for unit in units for case in unit.cases)
        return Counter((place, value) for row in values for place, value in enumerate(row))

    whole = parts_of(UNITS)
    for shard in range(1, num_shards + 1):
        part = parts_of(shard_of(UNITS, shard, num_shards))
        for value, count in whole.items():
            fair = count / num_shards
            assert abs(part[value] - fair) < 6 * fair**0.5 + 1, value  # four deviations: cases come in pairs


def test_a_beginning_has_every_folding_every_setting_and_both_types() -> None:
    beginning = [unit for unit in UNITS if unit.block == 0]
    assert len(beginning) == BLOCK * len(foldings())
    for place, values in enumerate(SETTINGS.values()):
        assert {unit.cases[index][7 + place] for unit in beginning for index in (0, 1)} == set(values)
    for folding in foldings():
        assert {unit.dtype for unit in beginning if unit.folding == folding} == {"float32", "float64"}


def test_cases_of_a_unit_differ_in_batches_alone() -> None:
    for unit in UNITS[::101]:
        one, two = unit.specs()
        assert (one.accumulation, two.accumulation) == (1, 2)
        assert replace(one, accumulation=2) == two
        assert (one.dtype, one.num_steps) == (unit.dtype, 1)


def test_what_is_refused_is_what_no_folding_has() -> None:
    legal = Counter(folding[0] for folding in foldings())
    assert refused_layouts() == {ranks: 6**6 - legal[ranks] for ranks in RANKS}


ERRORS = StepErrors(loss=0.0, aux=0.0, grad_norm=0.0, grads={"w": 1e-15}, params={"w": 0.0}, bias=0.0, wrong_counts=0)


class FakePool:
    """Answers at once; ``bad`` cases raise, and ``wrong`` ones are far off."""

    def __init__(self, bad: Sequence[VerifySpec] = (), wrong: Sequence[VerifySpec] = ()) -> None:
        self.bad, self.wrong = bad, wrong
        self.runs: list[list[VerifySpec]] = []

    def measure(self, cases: Sequence[Comparison], pools: RankPools) -> list[list[StepErrors]]:
        specs = [spec for spec, _ in cases]
        self.runs.append(specs)
        if any(spec in self.bad for spec in specs):
            raise RunFailedError("rank 1 failed to run the case: out of luck")
        far = StepErrors(
            loss=1.0, aux=0.0, grad_norm=0.0, grads={"w": 0.5}, params={"w": 0.0}, bias=0.0, wrong_counts=3
        )
        return [[far if spec in self.wrong else ERRORS] for spec in specs]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> FakePool:
    """No process is started, and the oracle is not asked."""
    fake = FakePool()
    monkeypatch.setattr(verify_product, "measure", fake.measure)
    monkeypatch.setattr(verify_product.Expectations, "of", lambda self, spec: (spec, Path("nowhere")))
    return fake


def specs_of(some: Sequence[Unit]) -> list[VerifySpec]:
    return [spec for unit in some for spec in unit.specs()]


def test_a_run_goes_on_where_it_ended(tmp_path: Path, pool: FakePool) -> None:
    path, todo = tmp_path / "progress.jsonl", UNITS[BLOCK - 3 : BLOCK + 3]  # of two foldings
    with Progress(path) as progress:
        assert prove(todo[:4], progress, timeout_s=1.0)
    assert pool.runs == [specs_of(todo[:3]), specs_of(todo[3:4])]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # killed while writing the last line
    with Progress(path) as progress:
        assert len(progress.outcomes) == 7
        assert prove(todo, progress, timeout_s=1.0)
    assert pool.runs[2:] == [specs_of(todo[3:])]
    with Progress(path) as progress:
        assert set(progress.outcomes) == {case_id(case) for unit in todo for case in unit.cases}
        assert all(outcome.ok for outcome in progress.outcomes.values())


def test_nothing_starts_after_the_deadline(tmp_path: Path, pool: FakePool) -> None:
    with Progress(tmp_path / "progress.jsonl") as progress:
        assert not prove(UNITS[:2], progress, timeout_s=1.0, deadline=time.monotonic() - 1)
        assert not progress.outcomes
    assert not pool.runs


def test_a_failure_is_written_down_and_the_run_goes_on(tmp_path: Path, pool: FakePool) -> None:
    todo = UNITS[:3]
    pool.bad = [todo[0].specs()[1]]
    pool.wrong = [todo[1].specs()[0]]
    failed, unequal = case_id(todo[0].cases[1]), case_id(todo[1].cases[0])
    with Progress(tmp_path / "progress.jsonl") as progress:
        prove(todo, progress, timeout_s=1.0)
        summary = summarise(todo, progress.outcomes)
        assert pool.runs == [specs_of(todo), *([spec] for spec in specs_of(todo))], "each alone"
        assert summary["cases"] == {"in all": 6, "equal": 4, "not equal": 1, "not finished": 1, "to do": 0}
        told = {failure["case"]: failure for failure in summary["failures"]}
        assert told.keys() == {failed, unequal}
        assert "out of luck" in told[failed]["error"]
        assert (told[unequal]["loss"], told[unequal]["grad"], told[unequal]["wrong_counts"]) == (1.0, 0.5, 3)
        pool.bad = []
        num_runs = len(pool.runs)
        prove(todo, progress, timeout_s=1.0)
        assert len(pool.runs) == num_runs, "what failed is not tried again unasked"
        prove(todo, progress, timeout_s=1.0, retry=True)
        assert progress.outcomes[failed].ok
        assert not progress.outcomes[unequal].ok, "what finished stays"


def test_progress_of_other_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "progress.jsonl"
    Progress(path).__exit__()
    monkeypatch.setattr("moetrain.verify.product.progress.fingerprint", lambda: "another")
    assert verify_main(["product", "--progress", str(path), "--only-summary"]) == 2
    assert "must be of this code" in capsys.readouterr().err
    path.write_text("no JSON at all\n")
    assert main(["--progress", str(path)]) == 2
    assert "begins with no JSON at all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("notes, and no newline", "begins with notes, and no newline; name another file"),
        ('{"moetrain verify product": "9', "must be of this code"),
        ("{HEADER} and more", "must be of this code"),
        ("{HEADER}\nnotes", "a line of it begins with notes; remove that line, or name another file"),
        ("{HEADER}\n[1, 2]\n", r"a line of it begins with \[1, 2\]"),
        ('{HEADER}\n{"case": 1, "mine": 2}\n', "must hold one outcome per line"),
    ],
)
def test_a_file_of_the_users_own_is_refused_and_stays(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text.replace("{HEADER}", progress_module._header()))
    before = path.read_bytes()
    for _ in range(2):  # what was refused is not locked
        with pytest.raises(ValueError, match=complaint):
            Progress(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 1, 20, -1])
def test_a_run_killed_within_its_first_line_goes_on(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    Progress(path).__exit__()
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    Progress(path).__exit__()
    assert path.read_bytes() == whole


def test_the_fingerprint_is_of_all_code_that_decides_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only runs and reports is left out by name, so that a new file counts until somebody says otherwise."""
    package = Path(moetrain.__file__).parent
    assert all((package / "verify" / f"{module}.py").is_file() for module in progress_module.REPORTERS)
    counted = set(progress_module._sources(package))
    deciding = ("verify/worker", "verify/shards", "verify/product/cases", "train/engine", "oracle/step")
    assert {package / f"{module}.py" for module in deciding} <= counted
    assert package / "verify" / "compare.py" not in counted
    before = fingerprint()
    monkeypatch.setattr(progress_module, "REPORTERS", progress_module.REPORTERS[1:])
    assert fingerprint() != before


def test_one_run_writes_a_file_and_others_may_read_it(tmp_path: Path, pool: FakePool) -> None:
    path = tmp_path / "progress.jsonl"
    with Progress(path) as progress:
        prove(UNITS[:1], progress, timeout_s=1.0)
        with pytest.raises(ValueError, match="another one writes it; name another file"):
            Progress(path)
        assert len(read_outcomes(path)) == 2
    half = path.read_bytes()[:-20]
    path.write_bytes(half)
    assert len(read_outcomes(path)) == 1
    assert path.read_bytes() == half, "reading changes nothing"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shard", "3/2"], "--shard must be i/n"),
        (["--shard", "0/2"], "got '0/2'"),
        (["--shard", "two"], "1/1 is the whole product"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--timeout", "-1"], "--timeout must be above 0"),
        (["--json", "."], "--json must name a file, but . is a folder"),
    ],
)
def test_refusals(arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--progress", str(tmp_path / "new.jsonl"), *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_summary_of_several_files(tmp_path: Path, pool: FakePool) -> None:
    paths = [tmp_path / f"{index}.jsonl" for index in range(2)]
    for shard, path in enumerate(paths, 1):
        assert main(["--progress", str(path), "--shard", f"{shard}/1000"]) == 0
    out = tmp_path / "out.json"
    arguments = ["--progress", str(paths[0]), "--also", str(paths[1]), "--only-summary", "--json", str(out)]
    assert main(arguments) == 0
    written = json.loads(out.read_text())
    parts = [shard_of(UNITS, shard, 1000) for shard in (1, 2)]
    assert written["cases"]["equal"] == sum(len(unit.cases) for part in parts for unit in part)
    assert written["cases"]["in all"] == NUM_CASES
    assert len(written["foldings"]) == 236
    assert (
        sum(folding["float64"][0] + folding["float32"][0] for folding in written["foldings"])
        == (written["cases"]["equal"])
    )
    assert written["worst"]["float64"]["grad"] == 1e-15
    assert written["machine"]["code"] == fingerprint()
    pool.wrong = [shard_of(UNITS, 3, 10000)[0].specs()[0]]
    assert main(["--progress", str(paths[0]), "--shard", "3/10000"]) == 1


def test_outcomes_are_held_to_the_tolerance_of_their_type() -> None:
    right: dict[str, Any] = {"case": "c", "ranks": 1, "seed": 0, "loss": 1e-12, "grad": 9e-6, "param": 0.0}
    assert Outcome(dtype="float32", **right).ok
    assert not Outcome(dtype="float64", **right).ok
    assert not Outcome(dtype="float32", **{**right, "param": None}).ok
    assert not Outcome(dtype="float32", **right, wrong_counts=1).ok
    assert not Outcome(dtype="float32", **right, error="died").ok


def test_summaries_are_json_of_few_lines() -> None:
    value = {"a": {"b": 1.5, 2: [1, 2]}, "rows": [{"x": 1}, {"x": None}], "none": {}}
    text = as_json(value)
    assert json.loads(text) == {"a": {"b": 1.5, "2": [1, 2]}, "rows": [{"x": 1}, {"x": None}], "none": {}}
    assert text.count("\n") == 10


def test_the_summary_beside_the_code_is_of_this_product() -> None:
    (path,) = (Path(__file__).parents[3] / "benchmarks" / "results").glob("verify_product_*.json")
    written = json.loads(path.read_text())
    assert [tuple(folding[axis] for axis in ("ranks", *AXES)) for folding in written["foldings"]] == foldings()
    assert written["cases"]["in all"] == NUM_CASES
    assert written["failures"] == []
    assert written["cases"]["to do"] == 0
    assert written["cases"]["equal"] == NUM_CASES
    for folding in written["foldings"]:
        for dtype, tolerance in TOLERANCE.items():
            num_equal, *errors = folding[dtype]
            assert num_equal == NUM_CASES // len(foldings()) // len(TOLERANCE), folding
            assert 0 < max(errors) <= tolerance


SAMPLE = os.environ.get("MOETRAIN_PRODUCT_SHARD", "1/401")  # odd: both types of numbers


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(0)
def test_a_shard_of_the_product_equals_the_oracle(tmp_path: Path) -> None:
    """``MOETRAIN_PRODUCT_SHARD`` (i/n) and ``MOETRAIN_PRODUCT_PROGRESS`` (a file, to go on with) choose."""
    shard, num_shards = map(int, SAMPLE.split("/"))
    path = Path(os.environ.get("MOETRAIN_PRODUCT_PROGRESS") or tmp_path / "progress.jsonl")
    todo = sorted(shard_of(UNITS, shard, num_shards), key=lambda unit: (unit.folding[0], unit.block))
    with Progress(path) as progress:
        assert prove(todo, progress, timeout_s=300.0)
        outcomes = [progress.outcomes[case_id(case)] for unit in todo for case in unit.cases]
    assert [outcome for outcome in outcomes if not outcome.ok] == []


@pytest.mark.dist
def test_cases_that_share_an_engine_equal_the_oracle_and_their_faults_do_not(tmp_path: Path) -> None:
    unit = next(unit for unit in UNITS if unit.folding == (2, 2, 1, 1, 2, 1, 1) and "sigmoid" in unit.cases[0])
    expectations = verify_product.Expectations(tmp_path)
    with RankPools(timeout_s=100.0) as pools:
        cases = [expectations.of(spec) for spec in unit.specs()]
        right = measure([*cases, cases[0]], pools)
        assert right[0] == right[2], "nothing is left of the case between"
        assert right[0] != right[1]
        mutated = replace(cases[0][0], mutate="average")
        wrong = measure([(mutated, cases[0][1])], pools)
    assert max(max(step.grads.values()) for (step,) in right) <= 1e-5
    assert max(wrong[0][0].grads.values()) > 1e-3


@pytest.mark.dist
def test_ranks_that_fail_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two cases has no file to compare with; the other one is proven by fresh processes."""
    unit = next(unit for unit in UNITS if unit.folding[0] == 1)
    right = verify_product.Expectations.of

    def of(expectations: verify_product.Expectations, spec: VerifySpec) -> Comparison:
        spec, path = right(expectations, spec)
        return spec, path if spec.accumulation == 2 else path.with_name("missing.pt")

    monkeypatch.setattr(verify_product.Expectations, "of", of)
    with Progress(tmp_path / "progress.jsonl") as progress:
        assert prove([unit], progress, timeout_s=100.0)
        bad, good = (progress.outcomes[case_id(case)] for case in unit.cases)
    assert good.ok
    assert "missing.pt" in (bad.error or "")
