"""A checkpoint on disk: a directory that is whole and says so, or is not there.

    step-00000020/
        model/          a Hugging Face directory with tokenizer and chat template; with LoRA the merged model
        adapter/        the adapter alone, with LoRA
        state/          what resuming needs besides: optimizer and master weights as safetensors, counters as JSON
        probe.json      log-probabilities of fixed sequences under the policy (Probe)
        manifest.json   size and sha256 of every file above (CheckpointManifest)
        manifest.sha256 the same of manifest.json

`publish` fills a hidden directory, syncs it, and renames it into place. `verify` reads every byte again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import time

from pydantic import ValidationError

from dpo_service.errors import CheckpointError
from dpo_service.manifests.checkpoint import CheckpointManifest, FileDigest
from dpo_service.storage import paths
from dpo_service.storage.store import Store

MANIFEST, SEAL = "manifest.json", "manifest.sha256"
MODEL, ADAPTER, STATE = "model", "adapter", "state"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class CheckpointFacts:
    """What a manifest says beyond the files themselves."""

    job_id: str
    step: int
    epoch: float
    base_model: str
    base_digest: str
    reference_digest: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    world_size: int = 1


def publish(store: Store, facts: CheckpointFacts, fill: Callable[[Path], None]) -> CheckpointManifest:
    """Write the checkpoint of `facts.step`: `fill` puts the files into the directory it is given.

    It appears under its key whole or not at all; a crash leaves at most a hidden directory that nothing reads.
    """
    with store.publishing(paths.checkpoint_dir(facts.job_id, facts.step)) as directory:
        fill(directory)
        manifest = _manifest(directory, facts)
        (directory / MANIFEST).write_text(manifest.model_dump_json(indent=1))
        (directory / SEAL).write_text(_sha256(directory / MANIFEST))
        _sync_tree(directory)
    _sync(store.path(paths.checkpoints_dir(facts.job_id)))
    return manifest


def verify(directory: Path) -> CheckpointManifest:
    """The manifest of a checkpoint whose every byte is as it was written.

    Raises:
        CheckpointError: a file is missing, added, cut short or altered, or the manifest is unreadable.
    """
    manifest = read_manifest(directory)
    present = {str(path.relative_to(directory)) for path in _files(directory)} - {MANIFEST, SEAL}
    listed = {entry.path for entry in manifest.files}
    for path in sorted(present ^ listed):
        raise CheckpointError(f"{directory.name}/{path} is {'missing' if path in listed else 'not in the manifest'}")
    for entry in manifest.files:
        if (directory / entry.path).stat().st_size != entry.bytes or _sha256(directory / entry.path) != entry.sha256:
            raise CheckpointError(f"{directory.name}/{entry.path} is not what was written: its digest differs")
    if manifest.digest != digest_files(manifest.files):
        raise CheckpointError(f"{directory.name}/{MANIFEST}: the digest does not follow from its files")
    return manifest


def read_manifest(directory: Path) -> CheckpointManifest:
    """The manifest as it stands; raises CheckpointError if it cannot be read or was altered."""
    try:
        if _sha256(directory / MANIFEST) != (directory / SEAL).read_text():
            raise CheckpointError(f"{directory.name}/{MANIFEST} is not what was written: its digest differs")
        return CheckpointManifest.model_validate_json((directory / MANIFEST).read_bytes())
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory.name}/{MANIFEST} cannot be read") from error


def digest_of(model_dir: Path) -> str:
    """sha256 over the sorted (path, sha256) pairs of a model directory: the identity of a model.

    For `model/` of a checkpoint it equals the manifest's `model_digest`. Hidden files and folders do not count.
    """
    return digest_files(_digests(model_dir))


def digest_files(files: Iterable[FileDigest]) -> str:
    total = hashlib.sha256()
    for entry in sorted(files, key=lambda entry: entry.path):
        total.update(f"{entry.path}\0{entry.sha256}\n".encode())
    return total.hexdigest()


def _manifest(directory: Path, facts: CheckpointFacts) -> CheckpointManifest:
    files = _digests(directory)
    return CheckpointManifest(
        job_id=facts.job_id,
        step=facts.step,
        epoch=facts.epoch,
        files=files,
        digest=digest_files(files),
        model_digest=digest_files(_below(MODEL, files)),
        base_model=facts.base_model,
        base_digest=facts.base_digest,
        reference_digest=facts.reference_digest,
        metrics=facts.metrics,
        world_size=facts.world_size,
        created_at=time(),
    )


def _below(folder: str, files: Iterable[FileDigest]) -> list[FileDigest]:
    """The files in `folder`, their paths relative to it."""
    start = f"{folder}/"
    return [file.model_copy(update={"path": file.path[len(start) :]}) for file in files if file.path.startswith(start)]


def _digests(directory: Path) -> tuple[FileDigest, ...]:
    return tuple(
        FileDigest(path=path.relative_to(directory).as_posix(), bytes=path.stat().st_size, sha256=_sha256(path))
        for path in _files(directory)
    )


def _files(directory: Path) -> list[Path]:
    """Every file below `directory`, sorted; hidden ones (a hub download's bookkeeping, `.git`) are left out."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
