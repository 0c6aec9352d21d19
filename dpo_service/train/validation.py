"""What an evaluation says, and how a split of rows is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dpo_service.clock import monotonic
from dpo_service.train import metrics
from dpo_service.train.batch import MicroBatch
from dpo_service.train.step import TrainState, baseline_of, evaluate_batch


@dataclass(frozen=True)
class Validation:
    """Metrics by name."""

    values: dict[str, float]
    """Of the policy: a checkpoint keeps them, and may be ranked by one."""
    work: dict[str, float] = field(default_factory=dict)
    """Of finding them: told, and forgotten."""


def over_rows(state: TrainState, batches: Callable[[], Iterator[MicroBatch]]) -> Validation:
    """The whole validation split, of which `batches()` is this rank's share; asked for once or twice."""
    started = monotonic()
    sums = metrics.empty(state.run.trained_rows, state.ranks.device)
    baseline = baseline_of(state, batches())
    for batch in batches():
        values = evaluate_batch(state, batch, baseline)
        if not batch.blank:
            sums.add(values)
    state.ranks.sum_tensor(sums.values_N)
    read = sums.read()
    return Validation(metrics.means(read, state.run.loss.name), metrics.rates(read, monotonic() - started))
