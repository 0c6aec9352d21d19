"""Logging: one line an event, to standard error or a file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
NOISY = ("httpx", "httpcore", "aiosqlite", "alembic.runtime.migration", "filelock", "urllib3")


def configure(level: str = "INFO", file: Path | None = None) -> None:
    """Set up the root logger. With `file`, lines go there as well as to standard error."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file))
    logging.basicConfig(level=level, format=FORMAT, handlers=handlers, force=True)
    quiet()


def quiet() -> None:
    """Keep the libraries that log every request to their warnings; also for processes whose logging is not ours."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
