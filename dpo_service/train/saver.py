"""When and how a run becomes a checkpoint.

    loop:    save(n) ── the one before is done? ── snapshot ── goes on training ── ... save(m) | settle
    thread:                                           └─> write, hash, sync, rename ── report

All ranks take part in `save` and `settle`: both wait for the checkpoint under way, and fail on every rank if it failed.
The thread runs on rank 0 only, one checkpoint at a time, so they appear in order. A process that is killed meanwhile
leaves the one before; a checkpoint is reported, and counts, when it is durable.
"""

from __future__ import annotations

import copy
import os
import secrets
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dpo_service.checkpoint.format import STATE, CheckpointFacts, publish
from dpo_service.checkpoint.load import Checkpoint
from dpo_service.checkpoint.probe import Probe
from dpo_service.checkpoint.retention import prune, ranked
from dpo_service.errors import CheckpointError
from dpo_service.storage import paths
from dpo_service.storage.store import Store
from dpo_service.train import saving, shares
from dpo_service.train.journal import Reports
from dpo_service.train.probe import take_probe
from dpo_service.train.step import TrainState

CHECKPOINTS_A_RUN = 10
NICENESS = 10
"""The writer yields to training where both want the same cores."""


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
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_be_nice)
        self._under_way: Future[None] | None = None
        self._group = int(state.ranks.sum([float(secrets.randbits(52)) if state.ranks.first else 0.0])[0])
        """Names this process group, so that files of one that was killed are not taken for its own."""
        self.newest: tuple[str, str] | None = (resumed.key, resumed.manifest.digest) if resumed else None
        """Storage key and digest of the last durable checkpoint; only rank 0 knows of those it has written."""
        self.every_steps = state.run.save_every_steps or max(1, round(state.total_steps / CHECKPOINTS_A_RUN))

    def save(self, step: int, epoch: float, metrics: dict[str, float], counters: dict[str, Any]) -> None:
        """Begin the checkpoint of `step`, unless it is there; returns when training may go on.

        Raises:
            CheckpointError: on every rank, the checkpoint before could not be written.
        """
        if self._step == step:
            return
        self.settle()
        probe = take_probe(self._state.policy, self._state.run.precision, self._state.ranks.device)
        share = shares.take(self._state, masters=saving.has_masters(self._state.run))
        taken = saving.snapshot(self._state)
        if taken is not None:
            counters = copy.deepcopy({"step": step, **counters})
            work = partial(self._publish, self._facts(step, epoch, dict(metrics)), taken, probe, share, counters)
            self._under_way = self._thread.submit(work)
        elif share is not None:
            self._under_way = self._thread.submit(shares.write, share, self._meeting_place(step))
        self._step = step

    def settle(self) -> None:
        """Return when the last checkpoint is durable.

        Raises:
            CheckpointError: on every rank, it could not be written.
        """
        error = self._under_way.exception() if self._under_way is not None else None
        self._under_way = None
        if self._state.ranks.sum([float(error is not None)])[0]:
            raise CheckpointError(f"a checkpoint could not be written: {error or 'see rank 0'}") from error

    def published(self) -> tuple[str, str] | None:
        """Storage key and digest of what a run that has ended gives; known to rank 0 only."""
        run = self._state.run
        if run.keep_best is None or not run.keep_best.publish or not self._state.ranks.first:
            return self.newest
        found = ranked(self._store, run.job_id, run.keep_best)
        if not found:
            self._tell(f"No checkpoint could be ranked by {run.keep_best.metric}: the last is published", level="warn")
            return self.newest
        best = found[0]
        value = best.metrics[run.keep_best.metric]
        self._tell(f"The best checkpoint is that of step {best.step}: {run.keep_best.metric} {value:.4f}")
        return paths.checkpoint_dir(run.job_id, best.step), best.digest

    def _tell(self, text: str, level: Literal["info", "warn"] = "info") -> None:
        if self._reports is not None:
            self._reports.message(text, level=level)

    def close(self) -> None:
        """Let the checkpoint under way be finished, whatever became of the run."""
        self._thread.shutdown(wait=True)

    def _facts(self, step: int, epoch: float, metrics: dict[str, float]) -> CheckpointFacts:
        run = self._state.run
        return CheckpointFacts(
            job_id=run.job_id,
            step=step,
            epoch=epoch,
            base_model=run.model.name,
            base_digest=self._base_digest,
            metrics=metrics,
            world_size=self._state.ranks.world,
        )

    def _meeting_place(self, step: int) -> Path:
        """Where the ranks of this very process group leave their shares; `prune` removes what is left of it."""
        target = self._store.path(paths.checkpoint_dir(self._state.run.job_id, step))
        return target.with_name(f".{target.name}.{self._group:013x}.tmp")

    def _publish(
        self,
        facts: CheckpointFacts,
        taken: saving.Snapshot,
        probe: Probe,
        share: shares.Share | None,
        counters: dict[str, Any],
    ) -> None:
        run = self._state.run
        reference = saving.reference_digest(run, taken.reference, self._base_digest)
        facts = replace(facts, reference_digest=reference)

        def fill(directory: Path) -> None:
            saving.write(directory, taken, probe, run, self._model_dir, counters)
            if share is not None:
                shares.collect(share, self._meeting_place(facts.step), directory / STATE)

        manifest = publish(self._store, facts, fill)
        key = paths.checkpoint_dir(run.job_id, facts.step)
        self.newest = (key, manifest.digest)
        pruned = prune(self._store, run.job_id, keep=run.keep_checkpoints, newest=facts.step, best=run.keep_best)
        if self._reports is not None:
            self._reports.checkpoint(facts.step, key, manifest.digest, facts.metrics, pruned)
            if taken.reference and reference is not None:
                self._reports.reference(facts.step, reference)


def _be_nice() -> None:
    """Linux schedules threads one by one; elsewhere the call would reach the whole process."""
    if os.uname().sysname == "Linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
