import pytest

from dpo_service.errors import TooFewVerdicts
from dpo_service.online.judges.guard import WindowGuard


def test_under_half_valid_in_a_full_window_ends_it_with_the_reasons():
    guard = WindowGuard(window=6)
    for why in (None, None, "timeout", "timeout", "timeout"):
        guard.note(why)
    with pytest.raises(TooFewVerdicts, match=r"only 2 of the last 6 .*\(timeout: 3, tie: 1\)"):
        guard.note("tie")


def test_half_is_enough_and_what_left_the_window_is_forgotten():
    guard = WindowGuard(window=4)
    for why in ("tie", "tie", None, None, None, "tie", "tie", None):
        guard.note(why)
    with pytest.raises(TooFewVerdicts):
        for _ in range(2):
            guard.note("tie")


def test_a_window_that_is_not_full_says_nothing_yet():
    guard = WindowGuard(window=100)
    for _ in range(99):
        guard.note("timeout")
