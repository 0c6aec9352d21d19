"""A training run, in plain torch: alone, or as one of several ranks.

    newest valid checkpoint, or the base model
        └─> at step 0: evaluate
            ┌──────────────────────────────────────────────────────────────────────┐
            │ stop asked? -> save, leave         (rank 0 asks, all ranks hear it)  │
            │ plan.assign(step) -> rows -> micro-batches -> train_step             │
            │ every logging_steps: report;  eval_every_steps: evaluate             │
            │ every save_every_steps and at the end: rank 0 saves, the others wait │
            └──────────────────────────────────────────────────────────────────────┘

What unblocks each part: a step waits for the slowest rank (two sums over ranks); a save for the disk; nothing waits for
the control plane, reports go to a spool. Rows are a function of the step, so resuming at step n is starting at step n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpo_service.checkpoint.format import CheckpointFacts, publish
from dpo_service.checkpoint.load import Checkpoint, newest_valid, opened
from dpo_service.checkpoint.retention import prune
from dpo_service.clock import monotonic
from dpo_service.errors import CheckpointError, TrainingError
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.rows.plan import BatchPlan
from dpo_service.specs.run import RunSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store
from dpo_service.train import metrics, saving
from dpo_service.train.batch import collate
from dpo_service.train.logprobs import packs
from dpo_service.train.losses import DIVISOR
from dpo_service.train.optim import build_optimizer
from dpo_service.train.policy import base_of
from dpo_service.train.ranks import Ranks
from dpo_service.train.reference import build_reference
from dpo_service.train.rows import RowTable
from dpo_service.train.step import StepResult, TrainState, evaluate_batch, train_step

CHECKPOINTS_A_RUN = 10


class Reports(Protocol):
    """The part of `reports.Reporter` a run uses."""

    def message(self, text: str) -> None: ...
    def metrics(self, split: str, step: int, values: dict[str, float], text: str) -> None: ...
    def checkpoint(
        self, step: int, storage_key: str, digest: str, metrics: dict[str, float], pruned: list[int]
    ) -> None: ...
    def progress(self, stage: str, done: int, total: int, text: str) -> None: ...


@dataclass(frozen=True)
class TrainOutcome:
    """How a run ended. Only rank 0 knows of checkpoints."""

    checkpoint: str | None
    """Storage key of the last checkpoint's directory; None = stopped before the first step."""
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
) -> TrainOutcome:
    """Train `run` from where its newest valid checkpoint stands, to its end or until `stop()`.

    `base_digest` is `digest_of(model_dir)`. Only rank 0 reports, saves, and asks `stop`.

    Raises:
        NonFiniteLoss: the loss or gradient is not finite; the weights did not move.
        CheckpointError: the checkpoint belongs to another base model.
        TrainingError: the dataset is not what its manifest says.
    """
    training = _Training(run, dataset, model_dir, store, base_digest, ranks or Ranks(), reports, stop)
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
    ) -> None:
        self._run, self._dataset, self._model_dir, self._store = run, dataset, model_dir, store
        self._base_digest, self._ranks, self._stop = base_digest, ranks, stop
        self._reports = reports if ranks.first else None
        self._rows = RowTable.load(store, dataset.train)
        self._validation = RowTable.load(store, dataset.validation) if dataset.validation else None
        self._plan = _plan(run, dataset, self._rows)
        self._check_reference()
        self._answer_tokens = self._rows.answer_tokens
        self._step, self._tokens, self._saved_step = 0, 0, 0
        self._window = metrics.empty(self._rows.paired)
        self._window_start = monotonic()
        self._latest: dict[str, float] = {}
        self._saved: tuple[str, str] | None = None
        self._state = self._start(_agreed_checkpoint(store, run.job_id, ranks))

    def _start(self, checkpoint: Checkpoint | None) -> TrainState:
        run, ranks = self._run, self._ranks
        policy = saving.load_policy(run, self._model_dir, checkpoint, ranks.device)
        reference = build_reference(run.reference.mode, policy, self._model_dir, run.precision, ranks.device)
        optimizer = build_optimizer(policy, run.optim)
        state = TrainState(run, policy, reference, optimizer, ranks, self._plan.total_steps)
        if checkpoint is not None:
            self._resume(checkpoint, saving.restore_optimizer(state, checkpoint))
        return state

    def _resume(self, checkpoint: Checkpoint, counters: dict[str, Any]) -> None:
        manifest = checkpoint.manifest
        if manifest.base_digest != self._base_digest:
            raise CheckpointError(
                f"{checkpoint.key} was trained from another base model (digest {manifest.base_digest[:12]}, "
                f"now {self._base_digest[:12]}); put the original model back or start a new job"
            )
        if counters["dataset_digest"] != self._dataset.train.digest:
            raise CheckpointError(f"{checkpoint.key} was trained on another dataset; start a new job")
        self._step = self._saved_step = manifest.step
        self._tokens, self._window = int(counters["num_tokens"]), dict(counters["window"])
        self._latest, self._saved = dict(manifest.metrics), (checkpoint.key, manifest.digest)

    def _check_reference(self) -> None:
        """The reference is the job's own base model: pinned by digest, checked at every start."""
        if self._run.reference.mode != "cached":
            return
        if self._dataset.reference_digest not in (None, self._base_digest):
            raise TrainingError("the cached reference log-probabilities come from another model than the job's base")
        if not self._rows.has_reference:
            raise TrainingError("the dataset holds no reference log-probabilities, and the job says they are cached")

    def run_to_end(self) -> TrainOutcome:
        self._announce()
        if self._step == 0:
            self._evaluate()
        while self._step < self._plan.total_steps:
            if self._stop_asked():
                self._save()
                return self._outcome(stopped=True)
            self._log(self._train_one())
            if self._due(self._run.eval_every_steps):
                self._evaluate()
            if self._due(self._run.save_every_steps or max(1, round(self._plan.total_steps / CHECKPOINTS_A_RUN))):
                self._save()
        return self._outcome(stopped=False)

    def _announce(self) -> None:
        if self._reports is None:
            return
        workers = f"{self._ranks.world} worker{'s' if self._ranks.world > 1 else ''}"
        start = f"resuming from step {self._step}" if self._step else f"{len(self._rows)} rows"
        self._reports.message(f"Training on {workers}, {start}, {self._plan.total_steps} steps")
        if not packs(base_of(self._state.policy)):
            self._reports.message("This model's attention cannot take packed rows; it is computed padded, more slowly")

    def _due(self, every: int | None) -> bool:
        last = self._step == self._plan.total_steps
        return last or (every is not None and self._step % every == 0)

    def _stop_asked(self) -> bool:
        return self._ranks.sum([float(self._ranks.first and self._stop())])[0] > 0

    def _train_one(self) -> StepResult:
        assigned = self._plan.assign(self._step, self._ranks.world, self._run.batch.micro_batch_size)
        batches = [collate(self._rows.take(micro)) for micro in assigned[self._ranks.rank] if len(micro)]
        step_rows = self._plan.rows(self._step)
        per_row = DIVISOR[self._run.loss.name] == "rows"
        divisor = len(step_rows) if per_row else int(self._answer_tokens[step_rows].sum())
        result = train_step(self._state, self._step, batches, float(divisor))
        self._step += 1
        self._tokens += int(result.sums["tokens"])
        metrics.add(self._window, result.sums)
        return result

    def _log(self, result: StepResult) -> None:
        if not self._due(self._run.logging_steps):
            return
        now = monotonic()
        values = metrics.means(self._window, self._run.loss.name) | {
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "num_tokens": float(self._tokens),
            "epoch": self._epoch,
            **metrics.rates(self._window, now - self._window_start),
        }
        self._window, self._window_start = metrics.empty(self._rows.paired), now
        self._latest |= values
        if self._reports is not None:
            total = self._plan.total_steps
            text = metrics.sentence(self._step, total, "training", values)
            self._reports.metrics("train", self._step, values, text)
            self._reports.progress("train", self._step, total, text)

    def _evaluate(self) -> None:
        """Over the whole validation split. Metrics have their plain names under the split "eval"; in a checkpoint's
        metrics, beside those of training, they carry the prefix `eval_`."""
        if self._validation is None:
            return
        started = monotonic()
        sums = metrics.empty(self._validation.paired)
        for indices in self._validation_share(self._validation):
            metrics.add(sums, evaluate_batch(self._state, collate(self._validation.take(indices))))
        sums = metrics.reduce(sums, self._ranks)
        values = metrics.means(sums, self._run.loss.name)
        self._latest |= {f"eval_{name}": value for name, value in values.items()}
        if self._reports is not None:
            values |= metrics.rates(sums, monotonic() - started)
            text = metrics.sentence(self._step, self._plan.total_steps, "validation", values)
            self._reports.metrics("eval", self._step, values, text)
        self._window_start += monotonic() - started

    def _validation_share(self, rows: RowTable) -> list[NDArray[np.int64]]:
        """This rank's micro-batches, rows of like length together."""
        order, size = np.argsort(rows.lengths, kind="stable"), self._run.batch.micro_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        return batches[self._ranks.rank :: self._ranks.world]

    @property
    def _epoch(self) -> float:
        return self._step / self._plan.steps_per_epoch

    def _save(self) -> None:
        """Publish a checkpoint of this step, unless it is there. Rank 0 writes, the others wait."""
        if self._saved_step == self._step:
            return
        started = monotonic()
        if self._ranks.first:
            self._publish()
        self._ranks.barrier()
        self._saved_step = self._step
        self._window_start += monotonic() - started

    def _publish(self) -> None:
        run = self._run
        facts = CheckpointFacts(
            job_id=run.job_id,
            step=self._step,
            epoch=self._epoch,
            base_model=run.model.name,
            base_digest=self._base_digest,
            reference_digest=None if run.reference.mode == "none" else self._base_digest,
            metrics=self._latest,
            world_size=self._ranks.world,
        )
        counters = {
            "step": self._step,
            "num_tokens": self._tokens,
            "window": self._window,
            "dataset_digest": self._dataset.train.digest,
        }
        manifest = publish(self._store, facts, lambda path: saving.write(path, self._state, self._model_dir, counters))
        key = paths.checkpoint_dir(run.job_id, self._step)
        self._saved = (key, manifest.digest)
        pruned = prune(self._store, run.job_id, keep=run.keep_checkpoints, newest=self._step)
        if self._reports is not None:
            self._reports.checkpoint(self._step, key, manifest.digest, self._latest, pruned)

    def _outcome(self, *, stopped: bool) -> TrainOutcome:
        key, digest = self._saved or (None, None)
        return TrainOutcome(key, digest, self._step, self._tokens, stopped, self._latest)


def _agreed_checkpoint(store: Store, job_id: str, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint all ranks go on from: rank 0 verifies, the others open the one it found."""
    found = newest_valid(store, job_id) if ranks.first else None
    step = int(ranks.sum([float(found.manifest.step) if found else 0.0])[0])
    if ranks.first or step == 0:
        return found
    return opened(store, job_id, step)


def _plan(run: RunSpec, dataset: DatasetManifest, rows: RowTable) -> BatchPlan:
    """The plan the data stage made, again: it is a pure function of these."""
    plan = BatchPlan(
        n_rows=len(rows),
        batch_size=run.batch.batch_size,
        n_epochs=run.batch.n_epochs,
        max_steps=run.batch.max_steps,
        shuffle=run.data.shuffle,
        seed=run.data.seed,
        lengths=rows.lengths,
    )
    if plan.total_steps != dataset.total_steps:
        raise TrainingError(
            f"the batch plan has {plan.total_steps} steps, the dataset's manifest {dataset.total_steps}"
        )
    return plan
