"""The rows of a run, as this rank's micro-batches of a step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dpo_service.errors import TrainingError
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.rows.plan import BatchPlan
from dpo_service.specs.run import RunSpec
from dpo_service.storage.store import Store
from dpo_service.train.batch import MicroBatch, collate
from dpo_service.train.losses import DIVISOR
from dpo_service.train.ranks import Ranks
from dpo_service.train.rows import RowTable


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

    def batches(self, step: int) -> list[MicroBatch]:
        """This rank's share of step number `step`, from 0; it may be empty."""
        assigned = self.plan.assign(step, self._ranks.world, self._run.batch.micro_batch_size)
        return [collate(self.rows.take(micro)) for micro in assigned[self._ranks.rank] if len(micro)]

    def divisor(self, step: int) -> float:
        """What the step's summed loss is divided by, over all ranks: its rows, or its (chosen) answers' tokens."""
        rows = self.plan.rows(step)
        return float(len(rows) if DIVISOR[self._run.loss.name] == "rows" else self._answer_tokens[rows].sum())

    def validation_batches(self) -> Iterator[MicroBatch]:
        """This rank's share of the validation split, rows of like length together."""
        if self.validation is None:
            return
        order, size = np.argsort(self.validation.lengths, kind="stable"), self._run.batch.micro_batch_size
        for start in range(self._ranks.rank * size, len(order), self._ranks.world * size):
            yield collate(self.validation.take(order[start : start + size]))


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
