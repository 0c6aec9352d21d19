"""What goes between curator and trainer: the pairs of a step, as token ids.

PromptRow ──> samples ──> verdict ──> PairRow ... ──> StepPairs ──> the training step
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dpo_service.online.evaluation import Evaluation
from dpo_service.online.judges.metrics import JudgeSums
from dpo_service.online.judges.port import Verdict
from dpo_service.online.port import Sample
from dpo_service.online.prompts import PromptRow


class Prompts(Protocol):
    """The prompts in the order of training."""

    def at(self, position: int) -> PromptRow:
        """The prompt at `position`, from 0; after the last the next epoch begins."""
        ...


@dataclass(frozen=True)
class PairRow:
    """One pair to train on: the very tokens that were sampled."""

    position: int
    """Of its prompt."""
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    version: int
    """The oldest policy that sampled one of the two."""
    chosen_logp: float | None
    """As the sampler computed it; None = the answer was not sampled."""
    rejected_logp: float | None
    truncated: bool = False
    """One of the two was cut off by the limit of tokens."""
    label: float | None = None
    """As in `train.rows.Example`."""


@dataclass(frozen=True)
class Turn:
    """A prompt, its answers, what was said of them, and what became of it: the record that is kept."""

    position: int
    prompt: PromptRow
    samples: tuple[Sample, ...]
    texts: tuple[str, ...]
    verdict: Verdict | None
    places: tuple[tuple[int, int], ...]
    """Of the chosen and the rejected answer of each pair; -1 = the row's own answer."""
    pairs: tuple[PairRow, ...]
    dropped: str | None
    """Why there is no pair."""


class SampleWriter(Protocol):
    """Keeps the records."""

    async def write(self, step: int, turns: tuple[Turn, ...]) -> None:
        """Those made for step number `step`, from 0. A step that is made again after a resume replaces its record."""
        ...


@dataclass
class StepStats:
    """What making a step's pairs took: sums, which add over steps."""

    steps: int = 0
    pairs: int = 0
    versions_behind: int = 0
    """Summed over pairs."""
    prompts: int = 0
    valid: int = 0
    """Prompts that gave a pair."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Prompts without a pair, by reason."""
    stale: int = 0
    """Pairs whose policy was too old when their step came."""
    answers: int = 0
    finished: int = 0
    tokens: int = 0
    """Sampled."""
    scored: int = 0
    """Answers that have a score."""
    reward: float = 0.0
    ranked: int = 0
    """Prompts with a scored answer."""
    best: float = 0.0
    worst: float = 0.0
    sample_seconds: float = 0.0
    judge_seconds: float = 0.0
    wait_seconds: float = 0.0
    """That the trainer waited."""
    sync_seconds: float = 0.0
    judge: JudgeSums = field(default_factory=JudgeSums)

    def note(self, turn: Turn) -> None:
        self.prompts += 1
        self.valid += turn.dropped is None
        if turn.dropped is not None:
            self.dropped[turn.dropped] += 1
        self.answers += len(turn.samples)
        self.finished += sum(sample.finished for sample in turn.samples)
        self.tokens += sum(len(sample.token_ids) for sample in turn.samples)
        scores = [score for score in (turn.verdict.scores if turn.verdict else ()) if score is not None]
        if scores:
            self.scored += len(scores)
            self.reward += sum(scores)
            self.ranked += 1
            self.best += max(scores)
            self.worst += min(scores)

    def __add__(self, other: StepStats) -> StepStats:
        return StepStats(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def report(self) -> dict[str, float]:
        """Metrics by name. What there was nothing of to measure is left out."""
        parts = {
            "online/valid_share": (self.valid, self.prompts),
            "online/finished_share": (self.finished, self.answers),
            "online/answer_tokens": (self.tokens, self.answers),
            "online/staleness": (self.versions_behind, self.pairs),
            "online/reward": (self.reward, self.scored),
            "online/reward_best": (self.best, self.ranked),
            "online/reward_worst": (self.worst, self.ranked),
            "online/sample_seconds": (self.sample_seconds, self.steps),
            "online/judge_seconds": (self.judge_seconds, self.steps),
            "online/wait_seconds": (self.wait_seconds, self.steps),
            "online/sampled_tokens_per_second": (self.tokens, self.sample_seconds),
        }
        report = {name: part / whole for name, (part, whole) in parts.items() if whole}
        report |= {"online/stale_dropped": float(self.stale), "online/sync_seconds": self.sync_seconds}
        report |= {f"online/dropped/{why}": float(count) for why, count in sorted(self.dropped.items())}
        return report | (self.judge.report() if self.judge.verdicts else {})


@dataclass(frozen=True)
class StepPairs:
    """Exactly the pairs of one step, in the order of their prompts."""

    step: int
    rows: tuple[PairRow, ...]
    synced: int
    """The version the samplers had; older weights are not needed any more."""
    stats: StepStats
    counters: dict[str, Any]
    """What a checkpoint after this step keeps, so that a resumed run goes on from here."""


class CuratorClient(Protocol):
    """The curator as a trainer's rank sees it. Every call blocks, and raises what made the curator fail."""

    def join(self, rank: int) -> None:
        """Say where this rank computes; asked of every rank before `samplers`, where these are on GPUs."""
        ...

    def samplers(self) -> Sequence[Any]:
        """Start samplers on GPUs, anew where there are some: handles of their actors."""
        ...

    def start(self, step: int, weights: Any, counters: Mapping[str, Any]) -> None: ...
    def pairs(self, step: int, sent: int = 0) -> StepPairs | None: ...
    def published(self, weights: Any, lent: bool = False) -> None: ...
    def evaluate(self, step: int) -> Evaluation: ...
