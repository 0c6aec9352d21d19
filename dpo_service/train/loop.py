"""A training run, in plain torch: alone, or as one of several ranks.

    newest valid checkpoint, or the base model
        └─> at step 0: evaluate
            ┌──────────────────────────────────────────────────────────────────────┐
            │ stop asked? -> save, leave         (rank 0 asks, all ranks hear it;  │
            │                 or the feed says so, which then has no rows to give) │
            │ plan.assign(step) -> rows -> micro-batches -> train_step             │
            │ every logging_steps: report;  eval_every_steps: evaluate             │
            │ a reference that moves: every reference_refresh.every_steps          │
            │ every save_every_steps and at the end: snapshot, a thread writes it  │
            └──────────────────────────────────────────────────────────────────────┘

What unblocks each part: a step waits for the slowest rank (two sums over ranks); a save for the one before it, and the
end for the last, to be durable; nothing waits for the control plane, reports go to a spool. Rows are a function of the
step, so resuming at step n is starting at step n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dpo_service.errors import StopAsked
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.specs.run import RunSpec
from dpo_service.storage.store import Store
from dpo_service.train.feed import Feed, StepFeed
from dpo_service.train.journal import Journal, Reports
from dpo_service.train.logprobs import packs, padded_because
from dpo_service.train.policy import base_of
from dpo_service.train.ranks import Ranks
from dpo_service.train.saver import Saver
from dpo_service.train.start import agreed_checkpoint, build_state, check_reference, counters_of
from dpo_service.train.step import train_step


@dataclass(frozen=True)
class TrainOutcome:
    """How a run ended. Only rank 0 knows of checkpoints."""

    checkpoint: str | None
    """Storage key of the directory of the last checkpoint, or of the best where the run says so and has ended; None =
    stopped before the first step."""
    digest: str | None
    steps: int
    trained_tokens: int
    stopped: bool
    """Asked to stop before the end."""
    metrics: dict[str, float] = field(default_factory=dict)


def never() -> bool:
    return False


def train(
    run: RunSpec,
    dataset: DatasetManifest,
    model_dir: Path,
    *,
    store: Store,
    base_digest: str,
    ranks: Ranks | None = None,
    reports: Reports | None = None,
    stop: Callable[[], bool] = never,
    feed: StepFeed | None = None,
) -> TrainOutcome:
    """Train `run` from where its newest valid checkpoint stands, to its end or until `stop()`.

    `base_digest` is `digest_of(model_dir)`. Only rank 0 reports, saves, and asks `stop`. `feed` is closed at the end;
    None = the rows of `dataset`.

    Raises:
        NonFiniteLoss: the loss or gradient is not finite; the weights did not move.
        CheckpointError: the checkpoint belongs to another base model, or one could not be written.
        TrainingError: the dataset is not what its manifest says.
    """
    ranks = ranks or Ranks()
    feed = feed or Feed(run, dataset, store, ranks)
    training = _Training(run, dataset, model_dir, store, base_digest, ranks, reports, stop, feed)
    return training.run_to_end()


class _Training:
    def __init__(
        self,
        run: RunSpec,
        dataset: DatasetManifest,
        model_dir: Path,
        store: Store,
        base_digest: str,
        ranks: Ranks,
        reports: Reports | None,
        stop: Callable[[], bool],
        feed: StepFeed,
    ) -> None:
        self._run, self._dataset, self._ranks, self._stop = run, dataset, ranks, stop
        reports = reports if ranks.first else None
        self._feed = feed
        self._plan = plan = feed.plan
        check_reference(run, dataset, feed.has_reference, base_digest)
        checkpoint = agreed_checkpoint(store, run.job_id, ranks)
        self._counters = counters = counters_of(checkpoint, dataset, base_digest) if checkpoint else {}
        self._state = build_state(run, model_dir, checkpoint, ranks, plan.total_steps, base_digest)
        self._journal = Journal(
            run,
            reports,
            steps_per_epoch=plan.steps_per_epoch,
            total_steps=plan.total_steps,
            ranks=ranks,
        )
        self._saver = Saver(self._state, store, model_dir, base_digest, reports, checkpoint)
        self._step = 0
        if checkpoint is not None:
            self._journal.resume(counters, checkpoint.manifest.metrics)
            self._step = checkpoint.manifest.step

    def run_to_end(self) -> TrainOutcome:
        try:
            stopped = self._go()
            self._saver.settle()
        finally:
            self._feed.close()
            self._saver.close()
        key, digest = (self._saver.newest if stopped else self._saver.published()) or (None, None)
        return TrainOutcome(key, digest, self._step, self._journal.tokens, stopped, self._journal.latest)

    def _go(self) -> bool:
        """Train; returns whether it was stopped before the end."""
        self._announce()
        try:
            self._train_all()
        except StopAsked:
            self._save()
            return True
        return False

    def _train_all(self) -> None:
        """
        Raises:
            StopAsked: between two steps, of all ranks.
        """
        self._feed.start(self._state, self._step, self._counters)
        if self._step == 0:
            self._evaluate()
        while self._step < self._plan.total_steps:
            if self._stop_asked():
                raise StopAsked(f"asked to stop after step {self._step}")
            self._train_one()
            saving = self._due(self._saver.every_steps)
            if self._due(self._run.eval_every_steps) or (saving and self._run.keep_best):
                self._evaluate()
            if self._state.moving is not None:
                self._state.moving.after_step(self._step)
            self._feed.after_step(self._state, self._step)
            if saving:
                self._save()

    def _announce(self) -> None:
        workers = f"{self._ranks.world} worker{'s' if self._ranks.world > 1 else ''}"
        start = f"resuming from step {self._step}" if self._step else self._feed.about
        self._journal.message(f"Training on {workers}, {start}, {self._plan.total_steps} steps")
        rate = self._journal.matrix_rate
        self._journal.message(
            f"Large matrix products reach {rate / 1e12:.3g} TFLOP/s ({self._run.precision}, all workers)",
            matrix_rate=rate,
        )
        policy = base_of(self._state.policy)
        if not packs(policy):
            self._journal.message(f"This model is computed padded, more slowly: {padded_because(policy)}")

    def _due(self, every: int | None) -> bool:
        last = self._step == self._plan.total_steps
        return last or (every is not None and self._step % every == 0)

    def _stop_asked(self) -> bool:
        return self._ranks.sum([float(self._ranks.first and self._stop())])[0] > 0

    def _train_one(self) -> None:
        batches, divisor = self._feed.batches(self._step), self._feed.divisor(self._step)
        result = train_step(self._state, self._step, batches, divisor)
        self._step += 1
        self._journal.add(result)
        if self._due(self._run.logging_steps):
            self._state.guard.check()
            self._journal.tell(self._step, result, self._feed.metrics())

    def _evaluate(self) -> None:
        """Over the whole validation split. On sampled pairs: held-out prompts, which the policy of now answers."""
        if not self._feed.validates:
            return
        self._state.guard.check()
        with self._journal.not_training():
            self._journal.tell_validation(self._step, self._feed.evaluate(self._state, self._step))

    def _save(self) -> None:
        self._state.guard.check()
        counters = {
            "dataset_digest": self._dataset.train.digest,
            "drift": self._state.drift.tolist(),
            **self._journal.counters(),
            **self._feed.counters(),
        }
        with self._journal.not_training():
            self._saver.save(self._step, self._plan.epoch(self._step), self._journal.latest, counters)
