"""Where a running stage stands, and when it will have ended at this pace."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from dpo_service.specs.base import Spec

TRAINING = "train"


class ProgressData(Spec):
    """The `data` of a progress report."""

    stage: str
    done: int
    total: int


class Progress(ProgressData):
    """The latest report, and the first one of the same stage and attempt to measure the pace from."""

    attempt: int
    message: str
    at: float
    since: float
    since_done: int


def advance(
    previous: Mapping[str, Any] | None, data: ProgressData, *, attempt: int, message: str, at: float
) -> Progress | None:
    """What to keep after a report made at `at` (seconds since the epoch); None = an older one came late."""
    known = Progress.model_validate(previous) if previous is not None else None
    if known is not None and at < known.at:
        return None
    same = known if known is not None and (known.stage, known.attempt) == (data.stage, attempt) else None
    return Progress(
        stage=data.stage,
        done=data.done,
        total=data.total,
        attempt=attempt,
        message=message,
        at=at,
        since=same.since if same else at,
        since_done=same.since_done if same else data.done,
    )


def estimated_finish(progress: Mapping[str, Any] | None) -> datetime | None:
    """When training ends if it goes on at its pace so far; None while no pace can be measured."""
    if progress is None:
        return None
    seen = Progress.model_validate(progress)
    covered = seen.done - seen.since_done
    if seen.stage != TRAINING or covered <= 0 or seen.at <= seen.since:
        return None
    seconds_each = (seen.at - seen.since) / covered
    return datetime.fromtimestamp(seen.at + seconds_each * max(0, seen.total - seen.done), UTC)
