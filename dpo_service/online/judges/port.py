"""The judges' port: a prompt with its answers goes in, a verdict comes out.

    JudgeRequest ──> Judge.judge ──> Verdict
     prompt            rules           scores    one an answer; None = there is none, and `missing` says why
     n answers         pairwise        pairs     what a pairwise judge said of two answers, in both orders
     reference, row    scoring ...     how it came: judge, raw replies, tokens, cost, seconds, from the cache

A judge that failed, abstained or could not tell two answers apart gives no score. None is not 0: it drops the pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Prompt = str | tuple[Mapping[str, Any], ...]
"""Plain text, or the messages of a conversation."""
Choice = Literal["first", "second", "tie"]
Outcome = Literal["first", "second", "tie", "missing"]

ABSTAINED = "abstained"
TIED = "tie"
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Answer:
    """One candidate, as it was sampled."""

    text: str
    token_ids: tuple[int, ...] = ()
    finished: bool = True
    """False = cut off by the limit of tokens."""


@dataclass(frozen=True)
class JudgeRequest:
    prompt: Prompt
    answers: tuple[Answer, ...]
    prompt_token_ids: tuple[int, ...] = ()
    reference: str | None = None
    """The row's own answer, where it has one."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, for verifiers."""


@dataclass(frozen=True)
class Usage:
    """What verdicts took. Sums: they add."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """In the currency of the prices the job gave."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cost + other.cost,
        )


NO_USAGE = Usage()


@dataclass(frozen=True)
class PairVerdict:
    """What a judge said of the answers `first` and `second` (their places in the request), asked in both orders."""

    first: int
    second: int
    orders: tuple[Choice | None, Choice | None]
    """What it chose with `first` shown before `second`, and with `second` shown before `first`. None = no reply."""
    missing: str | None = None
    """Why a reply is missing."""

    @property
    def outcome(self) -> Outcome:
        """What both orders agree on; orders that disagree make a tie."""
        one, other = self.orders
        if one is None or other is None:
            return "missing"
        return one if one == other else "tie"

    @property
    def flipped(self) -> bool:
        """It chose by position: the answer at the same place in both orders."""
        return set(self.orders) == {"first", "second"}


@dataclass(frozen=True)
class Verdict:
    judge: str
    scores: tuple[float | None, ...]
    missing: tuple[str | None, ...] = ()
    """Why an answer has no score, one an answer; empty where all have one."""
    pairs: tuple[PairVerdict, ...] = ()
    replies: tuple[str, ...] = ()
    """What the judge said, word for word."""
    usage: Usage = NO_USAGE
    seconds: float = 0.0
    cached: bool = False

    @property
    def complete(self) -> bool:
        """Nothing failed. A tie is an answer of the judge."""
        unscored = zip(self.scores, self.missing or (None,) * len(self.scores), strict=True)
        return all(score is not None or why == TIED for score, why in unscored) and all(
            pair.outcome != "missing" for pair in self.pairs
        )

    def between(self, one: int, other: int) -> Outcome | None:
        """What was said of two answers, seen from `one`; None = this judge was not asked about the two."""
        turned: dict[Outcome, Outcome] = {"first": "second", "second": "first"}
        for pair in self.pairs:
            if (pair.first, pair.second) == (one, other):
                return pair.outcome
            if (pair.first, pair.second) == (other, one):
                return turned.get(pair.outcome, pair.outcome)
        return None


@runtime_checkable
class Judge(Protocol):
    """Anything that gives verdicts. Safe to ask from many tasks of one event loop at once."""

    @property
    def name(self) -> str:
        """The kind of judge, as the job calls it."""
        ...

    @property
    def digest(self) -> str:
        """sha256 of all that its verdicts depend on beside the request: part of the key of the cache."""
        ...

    async def judge(self, request: JudgeRequest) -> Verdict:
        """The verdict on the request's answers.

        Raises:
            JudgeError: it can give no verdicts at all. What fails of one verdict only is in the verdict.
        """
        ...

    async def close(self) -> None:
        """Let go of connections and files."""
        ...
