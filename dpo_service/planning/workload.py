"""The rows of a job as micro-batches: how large the largest is, and how much a step computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dpo_service.planning.memory import Load
from dpo_service.rows.facts import Facts
from dpo_service.rows.plan import BatchPlan

SAMPLED_ROWS, MOST_SAMPLED_STEPS, LEAST_SAMPLED_STEPS = 8192, 64, 4
"""Steps whose micro-batches are looked at: enough for a mean, little enough for a request."""


@dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of each row to train on, [N] each; `rejected` is 0 where a row has one answer."""

    prompt: NDArray[np.int64]
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]
    mismatched: NDArray[np.int64] | None = None
    """KTO's answers of other rows, which go forward with the row's prompt and have no gradient."""

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def total(self) -> NDArray[np.int64]:
        trained = self.prompt + self.chosen + self.rejected
        return trained if self.mismatched is None else trained + self.mismatched

    @property
    def forward_only(self) -> Lengths | None:
        """The rows that go through the policy without a gradient."""
        return None if self.mismatched is None else Lengths(self.prompt, self.mismatched, 0 * self.chosen)

    @property
    def scored(self) -> Lengths:
        """The rows as a reference scores them beforehand: all answers after one prompt."""
        return self if self.mismatched is None else Lengths(self.prompt, self.chosen, self.mismatched)

    @classmethod
    def of(cls, facts: Facts, rows: int, sampled: int = 0, *, mismatched: bool = False) -> Lengths:
        """Of `rows` rows that stay: those whose tokens were counted stand for the others of a large file. Answers that
        are not there yet are taken to have `sampled` tokens; which row's answer is `mismatched` with which is the data
        stage's affair, and here it is the one before."""
        known = facts[(facts["reason"] == 0) & (facts["n_prompt"] >= 0)]
        some = known[np.arange(rows) % len(known)]
        prompt, chosen, rejected = (some[name].astype(np.int64) for name in ("n_prompt", "n_first", "n_second"))
        chosen, rejected = (np.where(answer < 0, sampled, answer) for answer in (chosen, rejected))
        return cls(prompt, chosen, rejected, np.roll(chosen, 1) if mismatched else None)

    @classmethod
    def alike(cls, rows: int, prompt: int, answer: int) -> Lengths:
        """Pairs that are all of one size."""
        return cls(*(np.full(rows, size, np.int64) for size in (prompt, answer, answer)))

    def within(self, max_length: int) -> Lengths:
        """As rows become under a shorter `max_length`: answers cut at the end, prompts at the beginning."""
        chosen, rejected = np.minimum(self.chosen, max_length - 1), np.minimum(self.rejected, max_length - 1)
        prompt = np.minimum(self.prompt, max_length - np.maximum(chosen, rejected))
        return Lengths(prompt, chosen, rejected, None if self.mismatched is None else np.roll(chosen, 1))


@dataclass(frozen=True)
class Workload:
    """What the busiest worker computes."""

    largest: Load
    """The micro-batch that needs the most memory."""
    mean: Load
    """Of a step: the sum over its micro-batches, in the mean over steps."""
    micro_batches: float
    """A step, in the mean."""
    tokens: float
    """Of a step over all workers, in the mean."""
    forward_only: Load | None = None
    """As `mean`, of KTO's mismatched answers."""


def load_of(lengths: Lengths, rows: Sequence[int], *, packed: bool = True) -> Load:
    """The micro-batch of `rows`; not packed, every sequence is padded to the longest."""
    prompt, chosen, rejected = (a[list(rows)] for a in (lengths.prompt, lengths.chosen, lengths.rejected))
    answers = int((chosen + rejected).sum())
    paired = rejected > 0
    if not packed:
        sequences = len(rows) + int(paired.sum())
        longest = int((prompt + np.maximum(chosen, rejected)).max(initial=0))
        return Load(sequences * longest, answers, 0, 0, sequences * longest * (longest + 1) // 2)
    joined = np.where(paired, prompt + rejected, 0)
    whole = prompt + chosen
    attended = whole * (whole + 1) // 2 + np.where(paired, joined * (joined + 1) // 2 - prompt * (prompt + 1) // 2, 0)
    return Load(
        tokens=int((prompt + chosen + rejected).sum()),
        answers=answers,
        rejoined=int(joined.sum()),
        seen=int((rejected * joined).sum()),
        attended=int(attended.sum()),
    )


@lru_cache(maxsize=16)
def workload(
    lengths: Lengths, batch_size: int, workers: int, rows: int, tokens: int, *, packed: bool = True
) -> Workload:
    """What a step of `batch_size` rows over `workers` is to the busiest of them, micro-batches as in training: of at
    most `rows` rows and `tokens` tokens."""
    # The order is the seed's affair; every row is seen once an epoch, so the longest is in some micro-batch.
    plan = BatchPlan(len(lengths), batch_size, 1, None, shuffle=True, seed=0, lengths=lengths.total)
    step_of = {int(row): step for step in range(plan.total_steps) for row in plan.rows(step)}
    longest = step_of[int(lengths.total.argmax())]
    count = min(MOST_SAMPLED_STEPS, max(LEAST_SAMPLED_STEPS, SAMPLED_ROWS // batch_size))
    sampled = sorted({longest, *np.linspace(0, plan.total_steps - 1, count).astype(int).tolist()})
    steps, everything, aside = [], list[Load](), list[Load]()
    for step in sampled:
        shares = plan.assign(step, workers, rows, tokens)
        micros = [micro for micro in _busiest(shares, lengths) if micro]
        loads = [load_of(lengths, micro, packed=packed) for micro in micros]
        everything += loads
        steps.append((_sum(loads), len(loads)))
        if lengths.forward_only is not None:
            aside.append(_sum(load_of(lengths.forward_only, micro, packed=packed) for micro in micros))
    return Workload(
        largest=max(everything, key=lambda load: (load.tokens, load.answers)),
        mean=_mean([load for load, _ in steps]),
        micro_batches=sum(count for _, count in steps) / len(steps),
        tokens=float(lengths.total.sum()) / plan.total_steps,
        forward_only=_mean(aside) if aside else None,
    )


def _busiest(shares: list[list[list[int]]], lengths: Lengths) -> list[list[int]]:
    return max(shares, key=lambda share: sum(int(lengths.total[micro].sum()) for micro in share if micro))


def _sum(loads: Iterable[Load]) -> Load:
    columns = [tuple(vars(load).values()) for load in loads]
    return Load(*(sum(column) for column in zip(*columns, strict=True)))


def _mean(loads: Sequence[Load]) -> Load:
    return Load(*(round(value / len(loads)) for value in vars(_sum(loads)).values()))
