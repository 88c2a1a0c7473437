"""Scripts name files of this repository: a file that moves must move there too."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "benchmarks").glob("*.sh"), ROOT / ".ci/run"])
PATH = re.compile(r"(?<![\w/.$}])(?:tests|benchmarks|launch|csrc|docs|findings|moetrain)/[\w./-]*\w")
MADE = {"benchmarks/results"}  # may be made by the script itself


def named_in(text: str) -> set[str]:
    code = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return set(PATH.findall("\n".join(code))) - MADE


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_names_is_there(script: Path) -> None:
    missing = [name for name in named_in(script.read_text()) if not (ROOT / name).exists()]
    built = [name for name in missing if re.fullmatch(r"moetrain/_C\S*", name)]
    assert sorted(set(missing) - set(built)) == []


def test_a_file_that_moved_is_noticed() -> None:
    text = 'TESTS=(tests/moe/test_router.py tests/ops)\n# tests/gone.py\n"$ROOT/build/tests/x.py" build/csrc/y'
    assert named_in(text) == {"tests/moe/test_router.py", "tests/ops"}
    assert not (ROOT / "tests/moe/test_router.py").exists()


def test_scripts_name_enough_for_this_to_mean_something() -> None:
    assert len(set().union(*(named_in(script.read_text()) for script in SCRIPTS))) > 20
