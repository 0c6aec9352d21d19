"""Which checkpoints stay."""

from __future__ import annotations

import shutil

from dpo_service.checkpoint.load import step_directories
from dpo_service.storage import paths
from dpo_service.storage.store import Store


def prune(store: Store, job_id: str, *, keep: int, newest: int) -> list[int]:
    """Delete all but the last `keep` checkpoints of a job, and what crashes left; returns the deleted steps.

    `newest` is the step just published: it stays even where damaged ones of later steps, passed over at resume and
    about to be written again, fill the quota.
    """
    directories = step_directories(store, job_id)
    just_published = store.path(paths.checkpoint_dir(job_id, newest))
    doomed = [path for path in directories[: max(0, len(directories) - max(1, keep))] if path != just_published]
    leftovers = store.path(paths.checkpoints_dir(job_id)).glob(".step-*.tmp")
    for directory in [*doomed, *leftovers]:
        shutil.rmtree(directory, ignore_errors=True)
    return [int(directory.name.removeprefix("step-")) for directory in doomed]
