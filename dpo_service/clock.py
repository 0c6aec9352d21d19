"""Time as a dependency, so that tests can own it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def now(self) -> datetime:
        """The current moment, timezone-aware, UTC."""
        ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)


class FakeClock:
    """Stands still until told to move."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self.seconds = start

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.seconds, UTC)

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


def unix(moment: datetime) -> int:
    """Whole seconds since the epoch: the API's `created_at`."""
    return int(moment.timestamp())


monotonic = time.monotonic
