"""What can be checked before torch is loaded: ranks, data and run folder, so that a mistake costs a moment."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path

from moetrain.config import RunConfig
from moetrain.config.errors import naming, require
from moetrain.data.dataset import PackedDataset
from moetrain.data.documents import DocumentDataset
from moetrain.data.manifest import Manifest
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.train.run_folder import RunFolder
from moetrain.train.sequence_profile import SequenceProfile


@dataclass(frozen=True, slots=True)
class Datasets:
    """The data of a run, opened and checked."""

    manifest: Manifest
    training: PackedDataset | DocumentDataset
    validation: PackedDataset | DocumentDataset


def preflight(run: RunConfig, world_size: int) -> RunFolder:
    """Check everything about ``run`` on ``world_size`` ranks that needs no device; nothing is written.

    Raises:
        ValueError: naming field, value and cure.
    """
    run.validate_for(world_size)
    with naming("data.path", "choose another --data.path, or mend that"):
        open_datasets(run)
    given_profile(run, world_size)
    folder = RunFolder(run.run_dir)
    with naming("run_dir", "choose another --run-dir, or mend that"):
        folder.begin(run)
    return folder


def given_profile(run: RunConfig, world_size: int) -> SequenceProfile | None:
    """The profile that ``sequence.costs`` names, if it names one.

    Raises:
        ValueError: there is none, or it is of another model or mesh.
    """
    mesh = FoldedMesh.of_run(run, world_size)
    path = run.sequence.costs_file
    if path is None:
        return None
    profile = SequenceProfile.read(path)
    profile.check(run, mesh, str(path))
    return profile


def open_datasets(run: RunConfig) -> Datasets:
    """Open both splits.

    Raises:
        ValueError: there is no such dataset, or its ids do not fit the model, or a split is empty.
    """
    manifest = Manifest.read(run.data.path)
    if manifest.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"model.vocab_size ({run.model.vocab_size}) must be at least {manifest.vocab_size}, the vocabulary of "
            f"{run.data.path}; set model.vocab_size to {manifest.vocab_size}"
        )
    weights = run.data.domain_weights
    kind = PackedDataset if run.data.packing == "rows" else DocumentDataset
    training = kind(run.data.path, "train", run.data.longest, run.seed, weights)
    if isinstance(training, DocumentDataset):
        _check_documents(training, run.data.batch_tokens, run.data.path)
    validation = kind(run.data.path, "validation", run.data.longest, run.seed, weights)
    return Datasets(manifest, training, validation)


def _check_documents(training: DocumentDataset, batch_tokens: int, path: Path) -> None:
    """Refuse steps most of which would have no document to learn from."""
    expected = training.expected_documents(batch_tokens)
    require(
        expected > 0, f"{path} has no document with a token to predict; prepare more text, or set data.packing to rows"
    )
    require(
        expected >= 1,
        f"data.batch_tokens ({batch_tokens}) must have at least one document in the mean, but the documents of {path} "
        f"are so long that it has {expected:.2g}; set it to {ceil(batch_tokens / expected)} or more, better to many "
        "times that, or set data.packing to rows",
    )
