from __future__ import annotations

from datetime import timedelta

import pytest

from dpo_service.jobs.retry import GiveUp, Retry, decide


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 15), (2, 30), (3, 60), (4, 120), (5, 300), (6, 600), (9, 600)])
def test_the_delay_grows_and_is_spread_by_a_fifth(attempt: int, seconds: int) -> None:
    lowest = decide(attempt, retryable=True, max_attempts=10, chance=0.0)
    middle = decide(attempt, retryable=True, max_attempts=10, chance=0.5)
    highest = decide(attempt, retryable=True, max_attempts=10, chance=1.0)
    assert [lowest, middle, highest] == [Retry(timedelta(seconds=seconds * f)) for f in (0.8, 1.0, 1.2)]


def test_the_last_attempt_has_no_successor() -> None:
    assert isinstance(decide(2, retryable=True, max_attempts=3, chance=0.5), Retry)
    assert isinstance(decide(3, retryable=True, max_attempts=3, chance=0.5), GiveUp)


def test_what_another_try_cannot_change_is_not_tried_again() -> None:
    assert isinstance(decide(1, retryable=False, max_attempts=3, chance=0.5), GiveUp)
