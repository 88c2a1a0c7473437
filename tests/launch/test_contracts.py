"""The contracts of import-linter in pyproject.toml hold, and an import that points up breaks the one that it should."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")
ROOT = Path(__file__).parents[2]
LINT = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command(sys.argv[1:])"
DOWN = "imports point down"
ROOMS = "the rooms of moe know what is below them alone"
BALANCE = "balance reads what routers give and nothing later"
DISPATCH = "in dispatch, plans know no way of sending"
OWN = "each router and each rule knows its contract alone"
UPDATE = "in balance, the rule of an update stands alone"
CHECKPOINT = "checkpoints know nothing of what they save"
UPWARD = [  # importing module, imported module, contract that refuses it
    ("ops.chunks", "mesh.groups", DOWN),
    ("moe.dispatch.plan", "moe.layer", ROOMS),
    ("moe.balance.losses", "moe.layer", ROOMS),
    ("moe.rules.capacity", "moe.dispatch.plan", ROOMS),
    ("moe.rules.rounding", "moe.routers.token_choice", ROOMS),
    ("moe.routers.token_choice", "moe.dispatch.plan", ROOMS),
    ("moe.routers.contract", "moe.balance.state", ROOMS),
    ("moe.experts", "moe.dispatch.contract", ROOMS),
    ("moe.routing", "moe.context", ROOMS),
    ("moe.balance.state", "moe.rules.contract", BALANCE),
    ("moe.dispatch.plan", "moe.dispatch.transport", DISPATCH),
    ("moe.dispatch.two_level", "moe.dispatch.padded", DISPATCH),
    ("moe.dispatch.groups", "moe.dispatch.destinations", DISPATCH),
    ("moe.rules.contract", "moe.rules.make", OWN),
    ("moe.rules.rounding", "moe.rules.capacity", OWN),
    ("moe.routers.contract", "moe.routers.token_choice", OWN),
    ("moe.balance.updates", "moe.balance.state", UPDATE),
    ("checkpoint.names", "models.names", CHECKPOINT),
    ("checkpoint.names", "mesh.groups", CHECKPOINT),
    ("checkpoint.manifest", "config.errors", CHECKPOINT),
]


def lint(folder: Path) -> str:
    """What the linter says of the package in ``folder``, without colours."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "NO_COLOR": "1", "COLUMNS": "400"}
    command = [sys.executable, "-c", LINT, "--no-logo", "--cache-dir", str(folder / "cache")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)


def path_of(folder: Path, module: str) -> Path:
    return folder / "moetrain" / f"{module.replace('.', '/')}.py"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linted")
    shutil.copytree(ROOT / "moetrain", folder / "moetrain", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_the_package_keeps_every_contract(copy: Path) -> None:
    said = lint(copy)
    assert ", 0 broken." in said, said


@pytest.fixture(scope="module")
def broken(copy: Path) -> dict[str, str]:
    """By contract, what the linter says where every import of ``UPWARD`` is there: one run for all of them."""
    sound = {importing: path_of(copy, importing).read_text() for importing, _, _ in UPWARD}
    for importing, imported, _ in UPWARD:
        with path_of(copy, importing).open("a") as file:
            file.write(f"\nimport moetrain.{imported}\n")
    said = lint(copy).partition("Broken contracts")[2]
    for importing, text in sound.items():
        path_of(copy, importing).write_text(text)
    parts = re.split(r"^(.+)\n-+$", said, flags=re.MULTILINE)  # each contract's name is underlined
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(("importing", "imported", "contract"), UPWARD)
def test_an_import_that_points_up_is_noticed(
    broken: dict[str, str], importing: str, imported: str, contract: str
) -> None:
    assert f"moetrain.{importing} -> moetrain.{imported} " in broken[contract]


def test_a_module_without_a_place_is_noticed(copy: Path) -> None:
    path = path_of(copy, "moe.dispatch.novel")
    path.touch()
    try:
        assert f"{DISPATCH} BROKEN" in lint(copy)
    finally:
        path.unlink()
