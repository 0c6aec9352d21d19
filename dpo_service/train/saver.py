"""When and how a run becomes a checkpoint. Rank 0 writes, the others wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_service.checkpoint.format import CheckpointFacts, publish
from dpo_service.checkpoint.load import Checkpoint
from dpo_service.checkpoint.retention import prune
from dpo_service.storage import paths
from dpo_service.storage.store import Store
from dpo_service.train import saving
from dpo_service.train.journal import Reports
from dpo_service.train.step import TrainState

CHECKPOINTS_A_RUN = 10


class Saver:
    def __init__(
        self,
        state: TrainState,
        store: Store,
        model_dir: Path,
        base_digest: str,
        reports: Reports | None,
        resumed: Checkpoint | None,
    ) -> None:
        self._state, self._store, self._model_dir = state, store, model_dir
        self._base_digest, self._reports = base_digest, reports
        self._step = resumed.manifest.step if resumed else 0
        self.newest: tuple[str, str] | None = (resumed.key, resumed.manifest.digest) if resumed else None
        """Storage key and digest of the last checkpoint; only rank 0 knows of those it has written."""
        self.every_steps = state.run.save_every_steps or max(1, round(state.total_steps / CHECKPOINTS_A_RUN))

    def save(self, step: int, epoch: float, metrics: dict[str, float], counters: dict[str, Any]) -> None:
        """Publish a checkpoint of `step`, unless it is there."""
        if self._step == step:
            return
        if self._state.ranks.first:
            self._publish(step, epoch, metrics, counters)
        self._state.ranks.barrier()
        self._step = step

    def _publish(self, step: int, epoch: float, metrics: dict[str, float], counters: dict[str, Any]) -> None:
        run = self._state.run
        facts = CheckpointFacts(
            job_id=run.job_id,
            step=step,
            epoch=epoch,
            base_model=run.model.name,
            base_digest=self._base_digest,
            reference_digest=None if run.reference.mode == "none" else self._base_digest,
            metrics=metrics,
            world_size=self._state.ranks.world,
        )
        counters = {"step": step, **counters}
        manifest = publish(self._store, facts, lambda path: saving.write(path, self._state, self._model_dir, counters))
        key = paths.checkpoint_dir(run.job_id, step)
        self.newest = (key, manifest.digest)
        pruned = prune(self._store, run.job_id, keep=run.keep_checkpoints, newest=step)
        if self._reports is not None:
            self._reports.checkpoint(step, key, manifest.digest, metrics, pruned)
