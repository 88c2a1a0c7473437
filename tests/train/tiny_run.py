"""A corpus of a few kilobytes and runs that take milliseconds per step."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launched import Launched, free_port
from layer_configs import layer_config

import moetrain
from moetrain.checkpoint import Manifest
from moetrain.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoELayerConfig,
    OptimConfig,
    RunConfig,
    SequenceConfig,
    TrainConfig,
)
from moetrain.config.load import to_toml
from moetrain.data.dataset import PackedDataset
from moetrain.data.loader import RowLoader
from moetrain.data.prep import prepare
from moetrain.data.sources import Source
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.sequence.data_planner import plan_data
from moetrain.train.engine import Engine, StepReport
from moetrain.train.metrics import MetricsLog
from moetrain.train.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
# With Python's fault handler a rank that is aborted says where it stood.
FOR_RANKS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(moetrain.__file__).parents[1]),  # ROOT, but where test.sh --torch has built another
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONFAULTHANDLER": "1",
}
TEXT = "the router sends each token to few experts and their weighted sum comes home again"


def make_corpus(folder: Path) -> Path:
    """Forty files of words, prepared."""
    text, out = folder / "text", folder / "corpus"
    text.mkdir(parents=True)
    chance = random.Random(5)
    for idx in range(40):
        (text / f"{idx:02d}.txt").write_text(" ".join(chance.choices(TEXT.split(), k=120)))
    prepare([Source(name="words", path=text)], out, validation_fraction=0.2)
    return out


def make_run(
    corpus: Path,
    run_dir: Path,
    *,
    steps: int = 6,
    mesh: MeshConfig | None = None,
    layer: MoELayerConfig | None = None,
    optim: OptimConfig | None = None,
    data: DataConfig | None = None,
    sequence: SequenceConfig | None = None,
    **train: Any,
) -> RunConfig:
    """A model of two layers (the first one dense), six experts, sequences of 32 bytes."""
    layer = layer or layer_config(num_experts=6, top_k=2, expert_width=24)
    return RunConfig(
        model=ModelConfig(
            num_layers=2, width=32, num_heads=2, num_kv_heads=1, head_dim=16, dense_first=1, dense_width=48
        ),
        moe=layer.moe,
        router=layer.router,
        balance=layer.balance,
        dispatch=layer.dispatch,
        mesh=mesh or MeshConfig(),
        data=data or DataConfig(path=corpus, seq_len=32, global_batch=6, micro_batch=2),
        sequence=sequence or SequenceConfig(),
        optim=optim or OptimConfig(warmup_steps=2),
        train=TrainConfig(steps=steps, device="cpu", eval_every=4, eval_rows=5, threads=1, **train),
        checkpoint=CheckpointConfig(every=2, keep=2),
        run_dir=run_dir,
    )


def used_folder(run: RunConfig) -> dict[Path, bytes]:
    """Make the folder of ``run`` look as if steps had been done and a checkpoint saved; its files, with contents."""
    folder = RunFolder(run.run_dir)
    folder.open(run)
    (folder.checkpoints / "step-00000002").mkdir()
    Manifest(step=2, tensors={}, files={}).write(folder.checkpoints / "step-00000002")
    MetricsLog(folder.metrics).append({"step": 1, "loss": 1.0, "num_loss_tokens": 180})
    return {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def make_engine(run: RunConfig, world_size: int) -> Engine:
    """An engine on the ranks of the default process group."""
    return Engine(run, MeshGroups.create(FoldedMesh.of_run(run, world_size)), "cpu")


def do_step(engine: Engine) -> StepReport:
    """The engine's next step on its run's corpus."""
    data, groups = engine.run.data, engine.groups
    loader = RowLoader(PackedDataset(data.path, "train", data.seq_len, engine.run.seed))
    plan = plan_data(loader.sequences_of_step(engine.num_steps_done, data.global_batch), groups.size("data"), 2)
    rank = groups.group_rank("data")
    return engine.step(plan, [loader.batch(plan, rank, idx) for idx in range(plan.num_rounds(rank))])


def with_mesh(run: RunConfig, **axes: Any) -> RunConfig:
    """The same run on another mesh."""
    return replace(run, mesh=MeshConfig(**axes))


def start_train(run: RunConfig, folder: Path, ranks: int, *options: str) -> subprocess.Popen[str]:
    """``moetrain train`` under torchrun in a process group of its own; its configuration is a file in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"{run.run_dir.name}.toml"
    config.write_text(to_toml(run))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    launcher += ["--master-addr", "127.0.0.1"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "moetrain", "train", "--config", str(config), *options],
        cwd=ROOT,
        env={**os.environ, **FOR_RANKS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_train(run: RunConfig, folder: Path, ranks: int, *options: str) -> tuple[int, str, str]:
    """Run it to its end: exit code, stdout, stderr."""
    return wait_for(start_train(run, folder, ranks, *options))


def start_ranks(run: RunConfig, folder: Path, ranks: int, restarts: Sequence[int] | None = None) -> Launched:
    """``moetrain train`` on ranks that are told their place without torchrun.

    Args:
        run: its configuration is a file in ``folder``.
        folder: of that file, and of what the ranks say.
        ranks: how many.
        restarts: of each rank, how many attempts it thinks came before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"{run.run_dir.name}.toml"
    config.write_text(to_toml(run))
    places = [{"TORCHELASTIC_RESTART_COUNT": str(count)} for count in restarts or [0] * ranks]
    return Launched([["train", "--config", str(config)]] * ranks, folder, places)


def wait_for(process: subprocess.Popen[str], timeout_s: float = 240) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of what ``start_train`` started.

    Raises:
        RuntimeError: it did not end in time, and was ended; where each rank stood is part of the text.
    """
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _abort_each(process.pid)
        raise RuntimeError(f"the ranks did not end in {timeout_s:g} s\n{_last_words(process)}") from None
    return process.returncode, out, err


def _abort_each(launcher: int) -> None:
    """Abort the ranks of a launcher one after another, so that each writes where it stands, and whole.

    All are stopped first: the launcher would end the others once one is gone, and a rank that waits for it would fail.
    """
    ranks = children(launcher)
    for pid in (launcher, *ranks):
        os.kill(pid, signal.SIGSTOP)
    for pid in ranks:
        os.kill(pid, signal.SIGABRT)
        os.kill(pid, signal.SIGCONT)  # a process that was stopped takes no other signal
        deadline = time.monotonic() + 10
        while _state(pid) != "Z" and time.monotonic() < deadline:  # its parent, stopped, has not heard of its end
            time.sleep(0.02)
    os.kill(launcher, signal.SIGCONT)


def _state(pid: int) -> str:
    """One letter of /proc: Z for a process that has ended and whose parent has not asked."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _last_words(process: subprocess.Popen[str]) -> str:
    """What torchrun and its ranks still write, now that the ranks were aborted; nothing of them is left afterwards."""
    try:
        return process.communicate(timeout=30)[1]
    except subprocess.TimeoutExpired:
        for pid in [*children(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)
        return process.communicate()[1]


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started, from /proc: torchrun starts its ranks in sessions of their own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return found


def losses(run_dir: Path) -> dict[int, float]:
    """Step to loss, from metrics.jsonl; every step must be there once."""
    return of_steps(run_dir, "loss")


def of_steps(run_dir: Path, name: str) -> dict[int, float]:
    """Step to a number of its record; ``seconds`` says apart two runs that computed the same."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    return {record["step"]: record[name] for record in steps}
