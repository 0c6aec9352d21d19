"""Whether a failed attempt gets a successor, and when. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

DELAYS_S = (15, 30, 60, 120, 300, 600)
JITTER = 0.2


@dataclass(frozen=True)
class Retry:
    delay: timedelta


@dataclass(frozen=True)
class GiveUp:
    why: str


def decide(failures: int, *, retryable: bool, max_attempts: int, chance: float) -> Retry | GiveUp:
    """What follows when the `failures`th attempt (from 1) has failed; those that were paused do not count.

    `retryable` is false for what another try cannot change: the user's mistakes and a loss that is not finite.
    `chance` in [0, 1) spreads the delay by +-20%, so that jobs that fell together do not rise together.
    """
    if not retryable:
        return GiveUp("another attempt would end the same way")
    if failures >= max_attempts:
        return GiveUp(f"that was failed attempt {failures} of {max_attempts}")
    base = DELAYS_S[min(failures, len(DELAYS_S)) - 1]
    return Retry(timedelta(seconds=base * (1 - JITTER + 2 * JITTER * chance)))
