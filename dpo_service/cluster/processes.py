"""Which processes belong to one local Ray head, and how to end them all and nothing else.

A machine may run several Rays, so nothing here goes by a program's name. A process is the head's when it carries the
head's mark in its environment, or was started by such a process. Ray's workers overwrite their environment with their
title: those are known by what they write into the head's directory. A notebook or a test that only connected to the
head has its environment whole and no mark in it; it is a guest and is spared.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "DPO_RAY_HEAD"
"""Environment variable that every process of the head inherits; its value is the head's directory."""
DAEMONS = ("gcs_server", "raylet")
GRACE_S = 2.0
"""For jobs and served models to end in order. Their checkpoints are whole or absent at any moment."""
REAP_S = 5.0
ROUNDS = 5


def belonging(directory: Path) -> list[psutil.Process]:
    """Every process of the head that keeps its files in `directory`, never this one or its ancestors."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid not in spared and _belongs(process, directory):
            for each in (process, *_children(process)):
                found[each.pid] = each
    return [process for pid, process in found.items() if pid not in spared]


def end(directory: Path) -> None:
    """SIGTERM, then SIGKILL, until none is left; then the shared memory they had mapped.

    The daemons get no SIGTERM: each would wait for the others, and their files are removed or recovered anyway.
    Raises RuntimeError if some survive.
    """
    found = belonging(directory)
    memory = shared_memory(found)
    _terminate([process for process in found if _name(process) not in DAEMONS])
    for _ in range(ROUNDS):
        if not (left := belonging(directory)):
            break
        memory |= shared_memory(left)
        _kill(left)
    else:
        raise RuntimeError(f"processes of Ray in {directory} do not end: {[process.pid for process in left]}")
    for path in memory - shared_memory(psutil.process_iter()):
        path.unlink(missing_ok=True)


def shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """Named files under /dev/shm that `processes` have mapped (Linux; elsewhere none)."""
    paths: set[Path] = set()
    for process in processes:
        try:
            text = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
        except OSError:
            continue
        paths.update(Path(match) for match in re.findall(r" (/dev/shm/.+)$", text, flags=re.MULTILINE))
    return {path for path in paths if path.exists()}


def started_at(pid: int) -> float | None:
    """When the process began (seconds since 1970); None when there is none. With the pid, it names a process."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def environment(pid: int) -> dict[str, str]:
    """What the process was started with; {} when it is gone or has overwritten it."""
    try:
        return psutil.Process(pid).environ()
    except (psutil.Error, OSError):
        return {}


def _terminate(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(processes, timeout=GRACE_S)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=REAP_S)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _belongs(process: psutil.Process, directory: Path) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        variables = environment(process.pid)
        if MARK in variables or "PATH" in variables:
            return variables.get(MARK) == str(directory)
        return _writes_into(process, directory)
    except (psutil.Error, OSError):
        return False


def _writes_into(process: psutil.Process, directory: Path) -> bool:
    """A reader (`tail -f` of a log) is a guest too."""
    inside = f"{directory}{os.sep}"
    return any(file.path.startswith(inside) and getattr(file, "mode", "r") != "r" for file in process.open_files())


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []
