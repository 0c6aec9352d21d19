"""How the demo talks: numbered stages with the time, everything on stderr, the results on stdout."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.markup import escape

from dpo_service.cli.output import duration, err


@dataclass
class Narrator:
    """Says what is being done, and keeps the time of it."""

    stages: int
    started: float = field(default_factory=time.monotonic)
    done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """One stage: announced, then timed under `name`."""
        self.done += 1
        err.print(f"\n[bold cyan]\\[{self.done}/{self.stages}][/bold cyan] [bold]{escape(text)}[/bold]", soft_wrap=True)
        begun = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begun
        err.print(f"      [dim]{duration(self.seconds[name])} (total {duration(self.total)})[/dim]")

    def say(self, text: str) -> None:
        err.print(f"      {escape(text)}", soft_wrap=True)

    @property
    def total(self) -> float:
        return time.monotonic() - self.started
