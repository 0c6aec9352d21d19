"""What commands print: tables for people, JSON for machines. Answers to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PIPE_WIDTH = 160
# No emoji: a model's id (ft:base:rocket:...) is no place for one. What goes into a file or a pipe is not folded.
out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, emoji=False)

STYLES = {
    "succeeded": "green",
    "running": "cyan",
    "queued": "yellow",
    "validating_files": "yellow",
    "failed": "red",
    "cancelled": "magenta",
    "pausing": "yellow",
    "paused": "yellow",
    "cancelling": "magenta",
    "pending": "yellow",
    "starting": "yellow",
    "deleting": "magenta",
}
FINER = ("pausing", "paused", "cancelling")


def print_json(value: Any) -> None:
    """One line, so that a stream of objects is JSON lines."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> Table:
    """The first column names things and is never cut; the others break where they must."""
    result = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for place, column in enumerate(columns):
        result.add_column(column, no_wrap=place == 0, overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def status(text: str) -> str:
    style = STYLES.get(text)
    return f"[{style}]{escape(text)}[/{style}]" if style else escape(text)


def job_status(job: Mapping[str, Any]) -> str:
    """The job's status; our own finer word where OpenAI's list has none."""
    state = str(job.get("state", ""))
    return state if state in FINER else str(job["status"])


def moment(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M") if seconds else ""


def duration(seconds: float) -> str:
    """`75` as `1:15`, `3700` as `1:01:40`."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
