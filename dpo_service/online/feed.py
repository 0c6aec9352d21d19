"""The curator's pairs as the training loop's micro-batches: what `train.feed.Feed` is for a dataset.

start       every rank: weights of the first version ──> curator.start           (rank 0)
batches(s)  every rank: curator.pairs(s) ──> this rank's share, as micro-batches  (the same pairs on every rank)
after_step  weights of version s + 1 ──> curator.published                        (rank 0)
evaluate    weights of this version ──> curator.published (rank 0); curator.evaluate ──> answers and scores, and this
            rank's share of their log-probabilities under policy and reference    (the same answers on every rank)

Where samplers are on GPUs, `start` begins with new ones, put beside the ranks if they share their devices; whole
weights are then sent by every rank (`device_export`), in `start`, in `after_step`, and in `batches` where a sampler was
restarted. Who shares its device gives it back what it has cached before the samplers wake.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_service.clock import monotonic
from dpo_service.errors import DpoServiceError, StopAsked, TrainingError
from dpo_service.online.device_export import Exporting, exporter_of
from dpo_service.online.divergence import divergence
from dpo_service.online.export import Exporter
from dpo_service.online.port import Weights
from dpo_service.online.steps import CuratorClient, PairRow, StepPairs, StepStats
from dpo_service.rows.plan import BatchPlan, PromptOrder
from dpo_service.specs.eval import HELD_OUT
from dpo_service.specs.run import BatchSpec
from dpo_service.specs.sampling import SamplerSpec
from dpo_service.train.batch import MicroBatch, collate
from dpo_service.train.ranks import Ranks
from dpo_service.train.rows import Example, RowTable
from dpo_service.train.step import TrainState
from dpo_service.train.validation import Validation

COUNTERS = "online"
ON_CPU = SamplerSpec()


@dataclass(frozen=True)
class OnlinePlan:
    """How long a run on samples is: an epoch is once through the prompts, if each gave one pair."""

    steps_per_epoch: int
    total_steps: int

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch


@dataclass(frozen=True)
class Mixed:
    """Pairs of a file among the sampled ones: `pairs` a step, epoch after epoch."""

    rows: RowTable
    order: PromptOrder
    pairs: int

    def examples(self, step: int) -> list[Example]:
        return self.rows.take(self.order.row(step * self.pairs + place) for place in range(self.pairs))


class OnlineFeed:
    """A `train.feed.StepFeed`."""

    has_reference = False

    def __init__(
        self,
        client: CuratorClient,
        plan: OnlinePlan,
        batch: BatchSpec,
        ranks: Ranks,
        *,
        sync_every: int | None,
        samplers: SamplerSpec = ON_CPU,
        shared: Path | None = None,
        mixed: Mixed | None = None,
        validates: bool = False,
        base_dir: Path | None = None,
    ) -> None:
        """`sync_every` in steps; None = the samplers keep the base model, in `base_dir`. `shared` as for
        `export.Exporter`. `validates`: the curator has held-out prompts."""
        self.plan, self.validates = plan, validates
        self._client, self._batch, self._ranks, self._mixed = client, batch, ranks, mixed
        self._sync_every, self._base_dir = sync_every, base_dir
        self._spec, self._shared = samplers, shared
        self._exporter: Exporting | None = None
        self._stats = StepStats()
        self._counters: dict[str, Any] = {}

    @property
    def about(self) -> str:
        return f"pairs that are sampled, {self._batch.batch_size} a step"

    def start(self, state: TrainState, step: int, counters: Mapping[str, Any]) -> None:
        """
        Raises:
            TrainingError: on every rank, the samplers could not be started, or not take the weights.
            StopAsked: on every rank, before they were there.
        """
        self._counters = dict(counters.get(COUNTERS, {}))
        if self._spec.gpus:
            self._make_room()
            self._client.join(self._ranks.rank)
            self._ranks.sum([0.0])  # all have joined
        with self._agreed():
            self._exporter = self._exporting(state)
        with self._agreed():
            weights = self._exporter.first(step) if self._exporter is not None else None
            if self._ranks.first:
                self._client.start(step, weights, self._counters)

    def _exporting(self, state: TrainState) -> Exporting | None:
        samplers = self._client.samplers() if self._spec.gpus and self._ranks.first else ()
        if self._sync_every is None and not self.validates:
            return None
        every, base = self._sync_every, self._base_dir
        return exporter_of(state, self._spec, every, self._ranks, samplers, base, self._shared)

    @contextmanager
    def _agreed(self) -> Iterator[None]:
        """What one rank raises within is raised on every rank."""
        error: DpoServiceError | None = None
        try:
            yield
        except DpoServiceError as raised:
            error = raised
        failed, stopped = self._ranks.sum([float(error is not None), float(isinstance(error, StopAsked))])
        if failed:
            other = StopAsked if stopped else TrainingError
            raise error or other("the samplers could not be started; see rank 0")

    def _make_room(self) -> None:
        """Before samplers wake on the device that every rank computes on: give back what it keeps without need."""
        if self._spec.shares_device:
            if self._ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            self._ranks.sum([0.0])  # each rank's own sampler may be woken by rank 0

    def batches(self, step: int) -> list[MicroBatch]:
        """This rank's share of the step; it may be empty.

        Raises:
            TrainingError: the curator has failed (online/curator.py).
            StopAsked: on every rank, before there were enough pairs.
        """
        examples = self._examples(self._waited_for(step))
        lengths = [len(row.prompt) + len(row.chosen) + len(row.rejected or ()) for row in examples]
        plan = BatchPlan(len(examples), len(examples), 1, 1, shuffle=False, seed=0, lengths=lengths)
        batch = self._batch
        assigned = plan.assign(0, self._ranks.world, batch.micro_batch_size, batch.micro_batch_tokens)
        made = [collate([examples[place] for place in micro]) for micro in assigned[self._ranks.rank] if micro]
        return [micro.pinned() for micro in made] if self._ranks.device.type == "cuda" else made

    def _waited_for(self, step: int) -> StepPairs:
        started = monotonic()
        sent = 0
        while (made := self._client.pairs(step, sent)) is None:
            sent += 1
            self._publish(self._exporter.first(step) if self._exporter is not None else None)
        made.stats.wait_seconds = monotonic() - started
        self._stats += made.stats
        self._counters = made.counters
        if self._exporter is not None:
            self._exporter.drop_before(made.synced)
        return made

    def _examples(self, made: StepPairs) -> list[Example]:
        examples = [_example(row) for row in made.rows]
        return examples + (self._mixed.examples(made.step) if self._mixed else [])

    def divisor(self, step: int) -> float:
        """Pairs: the losses that are trained on samples are means over them."""
        return float(self._batch.batch_size)

    def evaluate(self, state: TrainState, step: int) -> Validation:
        """
        Raises:
            TrainingError: the curator has failed (online/curator.py).
        """
        started = monotonic()
        lent = self._show(step)
        found = self._client.evaluate(step)
        seconds = monotonic() - started
        if lent and step < self.plan.total_steps:
            assert isinstance(self._exporter, Exporter)
            self._client.published(self._exporter.held)
        run = state.run
        far = divergence(state.policy, state.reference, found.answers, run.batch, state.ranks, run.precision)
        return Validation(found.report() | far, found.judge.report() | {f"{HELD_OUT}seconds": seconds})

    def _show(self, step: int) -> bool:
        """Let the samplers have the policy after `step` steps; whether it is only lent to them."""
        # One of devices lends nothing: admission refuses held-out prompts there.
        if not isinstance(self._exporter, Exporter) or step == self._exporter.held.version:
            return False
        weights = self._exporter.after(step)
        self._client.published(weights or self._exporter.lend(step), weights is None)
        return weights is None

    def after_step(self, state: TrainState, step: int) -> None:
        """Hand out the policy after `step` steps, where the samplers are to have it."""
        if step == self.plan.total_steps:
            return
        self._make_room()
        self._publish(self._exporter.after(step) if self._exporter is not None else None)

    def _publish(self, weights: Weights | None) -> None:
        if weights is not None and self._ranks.first:
            self._client.published(weights)

    def counters(self) -> dict[str, Any]:
        return {COUNTERS: self._counters}

    def metrics(self) -> dict[str, float]:
        """Of the steps since the last call; `wait_seconds` is this rank's."""
        stats, self._stats = self._stats, StepStats()
        return stats.report()

    def close(self) -> None:
        """Remove the weights that samplers were given. The curator is not this rank's to end."""
        if self._exporter is not None:
            self._exporter.close()


def _example(row: PairRow) -> Example:
    return Example(
        prompt=list(row.prompt),
        chosen=list(row.chosen),
        rejected=list(row.rejected),
        truncated=row.truncated,
        label=row.label,
        sampled_chosen=row.chosen_logp,
        sampled_rejected=row.rejected_logp,
    )
