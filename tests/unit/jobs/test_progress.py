from __future__ import annotations

from dpo_service.clock import unix
from dpo_service.jobs.progress import ProgressData, advance, estimated_finish


def at(done: int, seconds: float, previous: dict | None = None, stage: str = "train", attempt: int = 1) -> dict | None:
    data = ProgressData(stage=stage, done=done, total=10)
    kept = advance(previous, data, attempt=attempt, message="", at=seconds)
    return kept.model_dump() if kept else None


def test_the_pace_of_training_gives_the_end() -> None:
    seen = at(6, 1020.0, at(4, 1010.0, at(2, 1000.0)))
    # Four steps took 20 seconds; four are left.
    assert unix(estimated_finish(seen)) == 1040


def test_without_a_pace_there_is_no_estimate() -> None:
    assert estimated_finish(None) is None
    assert estimated_finish(at(2, 1000.0)) is None
    assert estimated_finish(at(2, 1010.0, at(2, 1000.0))) is None


def test_other_stages_do_not_say_when_training_ends() -> None:
    assert estimated_finish(at(5, 1010.0, at(1, 1000.0, stage="data"), stage="data")) is None


def test_a_new_stage_or_attempt_measures_anew() -> None:
    assert estimated_finish(at(5, 1010.0, at(1, 1000.0, stage="data"))) is None
    assert estimated_finish(at(5, 1010.0, at(1, 1000.0), attempt=2)) is None


def test_an_older_report_that_comes_late_is_dropped() -> None:
    assert at(3, 999.0, at(4, 1000.0)) is None
