"""Trainers that take their steps by turns, each in a process of its own, so that whatever else the machine does meets
all of them:

    parent: go -> ours: a step -> seconds     go -> TRL: a step -> seconds     go -> ours: ...
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Trainer = Callable[..., dict[str, Any]]
"""Called with its arguments and a `Turns`; what it returns is what it says at its end."""


class Turns:
    """A trainer's side: `wait` at the start of each step and once after the last."""

    def __init__(self, parent: Connection) -> None:
        self._parent = parent
        self._started: float | None = None

    def wait(self, *, last: bool = False) -> None:
        if self._started is None:
            restart_peak()
        else:
            self._parent.send(time.perf_counter() - self._started)
        if not last:
            self._parent.recv()
            self._started = time.perf_counter()


def restart_peak() -> None:
    """The peak of this process's resident size begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gigabytes() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def _process(trainer: Trainer, arguments: tuple[Any, ...], threads: int, parent: Connection) -> None:
    import torch

    torch.set_num_threads(threads)
    said = trainer(*arguments, Turns(parent))
    parent.send(said | {"peak": peak_gigabytes()})


def by_turns(
    trainers: Mapping[str, Trainer], arguments: tuple[Any, ...], *, steps: int, threads: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds by step, and what each said at its end, with its peak memory in gigabytes as "peak"."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name, trainer in trainers.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_process, args=(trainer, arguments, threads, theirs)))
        processes[-1].start()
        theirs.close()
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    try:
        for _ in range(steps):
            for name, pipe in pipes.items():
                pipe.send("go")
                seconds[name].append(pipe.recv())
        ends = {name: pipe.recv() for name, pipe in pipes.items()}
    except BaseException:  # one of them has failed, and said why: the others wait for their turn
        for process in processes:
            process.terminate()
        raise
    for process in processes:
        process.join()
    return seconds, ends
