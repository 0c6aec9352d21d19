"""The rows of a run, as this rank's micro-batches of a step.

    loop:    batches(n) ─────────> train_step(n) ─────────> batches(n + 1)
    thread:      └─> rows of step n + 1 ─> collate ─> pinned memory ─┘

One thread prepares the next step while this one is computed, and nothing else: what it makes is a function of the step.
An error in it is raised by `batches`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from dpo_service.errors import TrainingError
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.rows.plan import BatchPlan, micro_batches
from dpo_service.specs.run import RunSpec
from dpo_service.storage.store import Store
from dpo_service.train.batch import MicroBatch, collate
from dpo_service.train.losses import DIVISOR
from dpo_service.train.ranks import Ranks
from dpo_service.train.rows import RowTable
from dpo_service.train.step import TrainState
from dpo_service.train.validation import Validation, over_rows


class StepPlan(Protocol):
    """How long a run is."""

    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def total_steps(self) -> int: ...
    def epoch(self, step: int) -> float: ...


class StepFeed(Protocol):
    """Where the loop has its micro-batches from: a dataset (`Feed`), or the policy's own answers (`online.feed`)."""

    @property
    def plan(self) -> StepPlan: ...
    @property
    def has_reference(self) -> bool:
        """The rows hold the reference's log-probabilities."""
        ...

    @property
    def about(self) -> str:
        """What is trained on, for people."""
        ...

    @property
    def validates(self) -> bool:
        """There is a validation split."""
        ...

    def start(self, state: TrainState, step: int, counters: Mapping[str, Any]) -> None:
        """Called once, on every rank, before the first step: training goes on with step number `step`, from 0.
        `counters` are those of the checkpoint, empty without one."""
        ...

    def batches(self, step: int) -> list[MicroBatch]: ...
    def divisor(self, step: int) -> float: ...
    def evaluate(self, state: TrainState, step: int) -> Validation:
        """The validation split under the policy after `step` steps. Called on every rank, where `validates`."""
        ...

    def after_step(self, state: TrainState, step: int) -> None:
        """On every rank; `step` steps are done now."""
        ...

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps for `start`."""
        ...

    def metrics(self) -> dict[str, float]:
        """Of making the rows, since the last call."""
        ...

    def close(self) -> None: ...


class Feed:
    """Rows are a function of the step (`rows.plan`), so a run resumed at step n reads what the unbroken one reads.

    Raises:
        TrainingError: the dataset is not what its manifest says.
    """

    def __init__(self, run: RunSpec, dataset: DatasetManifest, store: Store, ranks: Ranks) -> None:
        self._run, self._ranks = run, ranks
        self.rows = RowTable.load(store, dataset.train)
        self.validation = RowTable.load(store, dataset.validation) if dataset.validation else None
        self.plan = _plan(run, dataset, self.rows)
        self._answer_tokens = self.rows.answer_tokens
        self._sharded = run.resources.strategy == "fsdp"
        self._thread = ThreadPoolExecutor(1, "feed")
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}

    @property
    def has_reference(self) -> bool:
        return self.rows.has_reference

    @property
    def about(self) -> str:
        return f"{len(self.rows)} rows"

    @property
    def validates(self) -> bool:
        return self.validation is not None

    def start(self, state: TrainState, step: int, counters: Mapping[str, Any]) -> None:
        """Nothing: the rows are a function of the step."""

    def after_step(self, state: TrainState, step: int) -> None:
        """Nothing: the rows do not depend on the policy."""

    def counters(self) -> dict[str, Any]:
        return {}

    def metrics(self) -> dict[str, float]:
        return {}

    def batches(self, step: int) -> list[MicroBatch]:
        """This rank's share of step number `step`, from 0; it may be empty, unless the model is sharded."""
        prepared = self._ahead.pop(step, None) or self._thread.submit(self._prepare, step)
        if step + 1 < self.plan.total_steps:
            self._ahead[step + 1] = self._thread.submit(self._prepare, step + 1)
        return prepared.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, step: int) -> list[MicroBatch]:
        batch = self._run.batch
        assigned = self.plan.assign(step, self._ranks.world, batch.micro_batch_size, batch.micro_batch_tokens)
        made = [self._collated(self.rows, rows) for rows in assigned[self._ranks.rank] if rows or self._sharded]
        return [micro.pinned() for micro in made] if self._ranks.device.type == "cuda" else made

    def _collated(self, table: RowTable, rows: Sequence[int]) -> MicroBatch:
        """Without rows, a blank one of the table's shortest row."""
        if not len(rows):
            return replace(self._collated(table, [int(np.argmin(table.lengths))]), blank=True)
        return collate(table.take(rows), table.mismatched(rows) if table.kind == "unpaired" else ())

    def divisor(self, step: int) -> float:
        """What the step's summed loss is divided by, over all ranks: its rows, or its (chosen) answers' tokens."""
        rows = self.plan.rows(step)
        return float(len(rows) if DIVISOR[self._run.loss.name] == "rows" else self._answer_tokens[rows].sum())

    def evaluate(self, state: TrainState, step: int) -> Validation:
        return over_rows(state, self.validation_batches)

    def validation_batches(self) -> Iterator[MicroBatch]:
        """This rank's share of the validation split, rows of like length together."""
        if self.validation is None:
            return
        batch, lengths = self._run.batch, self.validation.lengths
        runs = micro_batches(range(len(lengths)), lengths, batch.micro_batch_size, batch.micro_batch_tokens)
        while self._sharded and len(runs) % self._ranks.world:
            runs.append([])
        for rows in runs[self._ranks.rank :: self._ranks.world]:
            yield self._collated(self.validation, rows)


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
