"""One online run at a time gathers what it needs.

A run needs samplers and workers at the same time, and Ray gives them one after the other: two runs that each hold a
half would wait for the other's for ever. So a run takes its turn before it asks for samplers, and gives it back when
its workers are there too. Runs on a dataset ask once, and need no turn.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Turn:
    """A lock on a file; it goes with the process that holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def take(self) -> bool:
        """Whether it is ours now. Does not wait."""
        if self._file is not None:
            return True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        self._file = file
        return True

    def give_back(self) -> None:
        """May be called again."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)
