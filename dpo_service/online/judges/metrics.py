"""What the judge's verdicts were like, as sums that add: over prompts, over workers, over windows.

Counted(judge) adds up every verdict; `report()` makes rates of the sums, `judge/...` as in the job's metrics.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from dpo_service.online.judges.port import Judge, JudgeRequest, Usage, Verdict
from dpo_service.online.judges.spend import Purse

_BUCKETS_PER_DOUBLING = 4
"""A quantile is exact to 19%: 2 to the power of a quarter."""
_SHORTEST = 1e-4


@dataclass
class JudgeSums:
    verdicts: int = 0
    cached: int = 0
    answers: int = 0
    scored: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    """Answers without a score, by reason; ties of single comparisons are counted in `ties` only."""
    pairs: int = 0
    decided: int = 0
    ties: int = 0
    flips: int = 0
    """Comparisons in which the answer at the same place won both times."""
    usage: Usage = field(default_factory=Usage)
    seconds: Counter[int] = field(default_factory=Counter)
    """Verdicts that were asked for, by the bucket of how long they took."""
    spent: float = 0.0
    """All that the job's judge has cost so far, by earlier attempts too. No sum: of two the later one counts."""

    def note(self, verdict: Verdict) -> None:
        self.verdicts += 1
        self.cached += verdict.cached
        self.answers += len(verdict.scores)
        self.scored += sum(score is not None for score in verdict.scores)
        self.missing.update(why for why in verdict.missing if why is not None)
        outcomes = Counter(pair.outcome for pair in verdict.pairs)
        self.pairs += len(verdict.pairs)
        self.decided += outcomes["first"] + outcomes["second"]
        self.ties += outcomes["tie"]
        self.flips += sum(pair.flipped for pair in verdict.pairs)
        self.usage += verdict.usage
        if not verdict.cached:
            self.seconds[_bucket(verdict.seconds)] += 1

    def __add__(self, other: JudgeSums) -> JudgeSums:
        return JudgeSums(
            self.verdicts + other.verdicts,
            self.cached + other.cached,
            self.answers + other.answers,
            self.scored + other.scored,
            self.missing + other.missing,
            self.pairs + other.pairs,
            self.decided + other.decided,
            self.ties + other.ties,
            self.flips + other.flips,
            self.usage + other.usage,
            self.seconds + other.seconds,
            max(self.spent, other.spent),
        )

    def report(self) -> dict[str, float]:
        """Rates and totals by name. What there was nothing of to measure is left out."""
        report: dict[str, float] = {
            "judge/verdicts": self.verdicts,
            "judge/calls": self.usage.calls,
            "judge/prompt_tokens": self.usage.prompt_tokens,
            "judge/completion_tokens": self.usage.completion_tokens,
            "judge/cost": self.usage.cost,
        }
        report |= {"judge/spent": self.spent} if self.spent else {}
        report |= self._rates()
        report |= {f"judge/missing/{why}": count for why, count in sorted(self.missing.items())}
        for share, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
            if self.seconds:
                report[f"judge/seconds_{name}"] = quantile(self.seconds, share)
        return report

    def _rates(self) -> dict[str, float]:
        replied = self.decided + self.ties
        parts = {
            "cached": (self.cached, self.verdicts),
            "without_score": (self.answers - self.scored, self.answers),
            "failed_comparisons": (self.pairs - replied, self.pairs),
            "ties": (self.ties, replied),
            "position_flips": (self.flips, replied),
        }
        return {f"judge/{name}": part / whole for name, (part, whole) in parts.items() if whole}


def _bucket(seconds: float) -> int:
    return math.ceil(_BUCKETS_PER_DOUBLING * math.log2(max(seconds, _SHORTEST)))


def quantile(buckets: Counter[int], share: float) -> float:
    """The upper bound, in seconds, of the bucket within which `share` of the verdicts lies; `buckets` is not empty."""
    wanted, seen = share * buckets.total(), 0
    for bucket in sorted(buckets):
        seen += buckets[bucket]
        if seen >= wanted:
            break
    return float(2 ** (bucket / _BUCKETS_PER_DOUBLING))


class Counted:
    """`judge`, every verdict of it added to `sums`."""

    def __init__(self, judge: Judge, purse: Purse | None = None) -> None:
        """`purse` pays for its calls; None = they cost nothing."""
        self._judge, self._purse = judge, purse
        self.sums = JudgeSums()
        self.name = judge.name
        self.digest = judge.digest

    async def judge(self, request: JudgeRequest) -> Verdict:
        verdict = await self._judge.judge(request)
        self.sums.note(verdict)
        return verdict

    @property
    def uncounted(self) -> Judge:
        """The judge itself."""
        return self._judge

    def take(self) -> JudgeSums:
        """The sums since the last call."""
        sums, self.sums = self.sums, JudgeSums()
        sums.spent = self._purse.spent if self._purse is not None else 0.0
        return sums

    async def close(self) -> None:
        await self._judge.close()
