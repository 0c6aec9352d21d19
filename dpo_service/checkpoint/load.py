"""Finding what to go on from. The one mechanism for a killed worker, a killed driver and a new attempt."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from dpo_service.checkpoint.format import ADAPTER, MODEL, STATE, read_manifest, verify
from dpo_service.errors import CheckpointError
from dpo_service.manifests.checkpoint import CheckpointManifest
from dpo_service.storage import paths
from dpo_service.storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified."""

    key: str
    """Storage key of the directory."""
    path: Path
    manifest: CheckpointManifest

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    @property
    def state(self) -> Path:
        return self.path / STATE


def step_directories(store: Store, job_id: str) -> list[Path]:
    """The published checkpoint directories of a job, oldest step first, verified or not."""
    return sorted(store.path(paths.checkpoints_dir(job_id)).glob("step-*"))


def newest_valid(store: Store, job_id: str) -> Checkpoint | None:
    """The newest checkpoint of the job whose every digest holds; a damaged one is passed over with a warning."""
    for directory in reversed(step_directories(store, job_id)):
        try:
            return Checkpoint(store.key(directory), directory, verify(directory))
        except CheckpointError as error:
            log.warning("checkpoint passed over: %s", error.message)
    return None


def opened(store: Store, job_id: str, step: int) -> Checkpoint:
    """The checkpoint of `step`, which another process has verified; only its manifest is checked again."""
    key = paths.checkpoint_dir(job_id, step)
    return Checkpoint(key, store.path(key), read_manifest(store.path(key)))
