"""Win probabilities over the K samples of a prompt, as SPPO trains on them (arXiv:2405.00675, section 4).

P(y_i beats the policy) is estimated by the mean of P(y_i beats y_k) over the K samples, y_i itself at 1/2 among them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_service.online.judges.port import Outcome, Verdict

_WORTH: dict[Outcome | None, float | None] = {"first": 1.0, "second": 0.0, "tie": 0.5, "missing": None, None: None}


@dataclass(frozen=True)
class WinPair:
    """The sample with the highest and the one with the lowest probability to beat the policy, and these."""

    chosen: int
    rejected: int
    p_chosen: float
    p_rejected: float


def by_comparison(verdict: Verdict) -> list[float | None]:
    """Each answer's probability to beat the policy, from the comparisons of a pairwise judge; a tie is 1/2.

    A comparison that failed is left out of the mean; None = none of the answer's was made.
    """
    places = range(len(verdict.scores))
    return [_mean([_WORTH[verdict.between(one, other)] for other in places if other != one]) for one in places]


def by_score(scores: Sequence[float | None], scale: float = 1.0) -> list[float | None]:
    """The same from scores, by Bradley and Terry: P(i beats k) = sigmoid((s_i - s_k) / scale).

    `scale` is in units of the score: 1 for a reward model, whose scores are logits.
    """
    assert scale > 0, "a scale is above 0"

    def beats(one: int, other: int) -> float | None:
        mine, yours = scores[one], scores[other]
        return None if mine is None or yours is None else _sigmoid((mine - yours) / scale)

    places = range(len(scores))
    return [_mean([beats(one, other) for other in places if other != one]) for one in places]


def best_and_worst(probabilities: Sequence[float | None]) -> WinPair | None:
    """SPPO's pair; None where under two probabilities are known, or all are equal."""
    known = [(value, place) for place, value in enumerate(probabilities) if value is not None]
    if not known:
        return None
    highest, chosen = max(known, key=lambda one: (one[0], -one[1]))
    lowest, rejected = min(known, key=lambda one: (one[0], one[1]))
    return WinPair(chosen, rejected, highest, lowest) if highest > lowest else None


def _mean(against_others: Sequence[float | None]) -> float | None:
    known = [value for value in against_others if value is not None]
    return statistics.fmean([0.5, *known]) if known else None


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
