import math

import pytest

from dpo_service.online.judges.port import PairVerdict, Verdict
from dpo_service.online.winning import WinPair, best_and_worst, by_comparison, by_score


def compared(count, *pairs):
    return Verdict("pairwise", (None,) * count, (), pairs)


def test_comparisons_give_the_mean_over_all_samples_the_own_one_at_a_half():
    verdict = compared(
        3,
        PairVerdict(0, 1, ("first", "first")),
        PairVerdict(0, 2, ("first", "second")),
        PairVerdict(1, 2, ("second", "second")),
    )
    assert by_comparison(verdict) == pytest.approx([2 / 3, 1 / 6, 2 / 3])


def test_what_failed_is_left_out_and_is_not_a_loss():
    verdict = compared(3, PairVerdict(0, 1, ("first", None)), PairVerdict(0, 2, ("second", "second")))
    assert by_comparison(verdict) == [0.25, None, 0.75]


def test_scores_give_bradley_and_terrys_probabilities():
    high, low = by_score([1.0, None, 0.0])[::2]
    assert high == pytest.approx((0.5 + 1 / (1 + math.exp(-1))) / 2)
    assert high + low == pytest.approx(1)
    assert by_score([1.0, None, 0.0])[1] is None
    assert by_score([10.0, 0.0], scale=10.0) == pytest.approx(by_score([1.0, 0.0]))
    assert by_score([5000.0, -5000.0]) == [0.75, 0.25]


def test_the_pair_is_the_highest_and_the_lowest():
    assert best_and_worst([0.4, None, 0.7, 0.2]) == WinPair(2, 3, 0.7, 0.2)
    assert best_and_worst([0.5, 0.5]) is None
    assert best_and_worst([0.5, None]) is None
    assert best_and_worst([None]) is None
