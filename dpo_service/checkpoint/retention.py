"""Which checkpoints stay."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from dpo_service.checkpoint.format import read_manifest
from dpo_service.checkpoint.load import step_directories
from dpo_service.errors import CheckpointError
from dpo_service.manifests.checkpoint import EVALUATED_AT, CheckpointManifest
from dpo_service.specs.eval import BestSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store


def prune(store: Store, job_id: str, *, keep: int, newest: int, best: BestSpec | None = None) -> list[int]:
    """Delete all but the last `keep` and the `best` checkpoints of a job and those in use, and what crashes left;
    returns the deleted steps.

    `newest` is the step just published: it stays even where damaged ones of later steps, passed over at resume and
    about to be written again, fill the quota.
    """
    directories = step_directories(store, job_id)
    stay = {*directories[-max(1, keep) :], store.path(paths.checkpoint_dir(job_id, newest))}
    if best is not None:
        stay |= {
            store.path(paths.checkpoint_dir(job_id, made.step)) for made in ranked(store, job_id, best)[: best.keep]
        }
    doomed = [path for path in directories if path not in stay and not _in_use(store, path)]
    leftovers = store.path(paths.checkpoints_dir(job_id)).glob(".step-*.tmp")
    for directory in [*doomed, *leftovers]:
        shutil.rmtree(directory, ignore_errors=True)
    return [int(directory.name.removeprefix("step-")) for directory in doomed]


def _in_use(store: Store, directory: Path) -> bool:
    return store.exists(paths.keep_flag(store.key(directory)))


def ranked(store: Store, job_id: str, best: BestSpec) -> Sequence[CheckpointManifest]:
    """The job's checkpoints that were evaluated as they are, the best first; of equal ones the earlier."""
    sign = 1 if best.better == "lower" else -1
    manifests = [made for path in step_directories(store, job_id) if (made := _readable(path)) is not None]
    evaluated = [
        made for made in manifests if made.metrics.get(EVALUATED_AT) == made.step and best.metric in made.metrics
    ]
    return sorted(evaluated, key=lambda made: (sign * made.metrics[best.metric], made.step))


def _readable(directory: Path) -> CheckpointManifest | None:
    try:
        return read_manifest(directory)
    except CheckpointError:
        return None
