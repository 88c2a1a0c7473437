"""Every documented example of the package computes what it says."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "moetrain").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_compute_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    written = Path(str(module.__file__)).read_text(encoding="utf-8").count(">>> ")
    result = doctest.testmod(module)
    assert (result.failed, result.attempted) == (0, written), "see the captured output"


def test_a_wrong_example_would_be_noticed() -> None:
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(example, out=lambda text: None).failed == 1
