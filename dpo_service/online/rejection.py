"""Statistical rejection sampling (RSO, arXiv:2309.06657, algorithm 1): of the initial policy's answers, those that the
optimal policy would give.

The optimal policy for a reward r is pi(y|x) proportional to pi_init(y|x) exp(r(x, y) / beta). A candidate of pi_init is
accepted with probability exp((r - r_max) / beta), where r_max is the highest reward among the candidates that are left.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_service.online.pairs import Pair


@dataclass(frozen=True)
class Accepted:
    places: tuple[int, ...]
    """The accepted candidates, in the order of their acceptance; none twice."""
    candidates: int
    """Those that had a reward."""
    rounds: int
    ran_out: bool
    """Fewer were accepted than were wanted: the candidates were used up, or the rounds were."""


def rejection_sample(
    rewards: Sequence[float | None], wanted: int, beta: float, seed: str, *, max_rounds: int = 1000
) -> Accepted:
    """Up to `wanted` candidates by algorithm 1. A candidate without a reward takes no part.

    `beta` is above 0, in units of the reward; towards 0 the best are taken, towards infinity all alike. Each round
    accepts the best that is left at least, so the rounds bound nothing but the randomness of large `beta`.
    """
    assert beta > 0, "exp(r / beta) needs a beta above 0"
    rng = random.Random(seed)
    left = {place: reward for place, reward in enumerate(rewards) if reward is not None}
    candidates, accepted, rounds = len(left), list[int](), 0
    while left and len(accepted) < wanted and rounds < max_rounds:
        rounds += 1
        highest = max(left.values())
        passed = [place for place, reward in left.items() if rng.random() < math.exp((reward - highest) / beta)]
        for place in passed[: wanted - len(accepted)]:
            accepted.append(place)
            del left[place]
    return Accepted(tuple(accepted), candidates, rounds, len(accepted) < wanted)


def first_round_pairs(accepted: Sequence[int], rewards: Sequence[float | None], seed: str) -> tuple[Pair, ...]:
    """The accepted candidates in random pairs, each labelled by reward ("first-round-rank" of section 3.3); a pair of
    equal rewards says nothing and is left out."""
    shuffled = list(accepted)
    random.Random(seed).shuffle(shuffled)
    pairs = []
    for one, other in zip(shuffled[::2], shuffled[1::2], strict=False):
        first, second = rewards[one], rewards[other]
        assert first is not None, "an accepted candidate has a reward"
        assert second is not None, "an accepted candidate has a reward"
        if first != second:
            chosen, rejected = (one, other) if first > second else (other, one)
            pairs.append(Pair(chosen, rejected, abs(first - second)))
    return tuple(pairs)
