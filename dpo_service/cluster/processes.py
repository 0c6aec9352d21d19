"""Which processes belong to one local Ray head, and how to end them all and nothing else.

A machine may run several Rays, so nothing here goes by a program's name. A process is the head's when it carries the
head's mark in its environment, writes into the head's directory, or was started by such a process. Two signs are
needed because Ray's workers overwrite their environment with their title.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

MARK = "DPO_RAY_HEAD"
"""Environment variable that every process of the head inherits; its value is the head's directory."""
GRACE_S = 4.0
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

    Raises RuntimeError if some survive.
    """
    memory: set[Path] = set()
    for attempt in range(ROUNDS):
        processes = belonging(directory)
        if not processes:
            break
        memory |= shared_memory(processes)
        _terminate(processes, grace=GRACE_S if attempt == 0 else 0.0)
    else:
        left = [f"{process.pid}" for process in belonging(directory)]
        if left:
            raise RuntimeError(f"processes of Ray in {directory} do not end: {', '.join(left)}")
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


def _terminate(processes: list[psutil.Process], grace: float) -> None:
    for process in _gone_is_fine(processes):
        process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in _gone_is_fine(alive):
        process.kill()
    psutil.wait_procs(alive, timeout=GRACE_S)


def _gone_is_fine(processes: Iterable[psutil.Process]) -> Iterator[psutil.Process]:
    for process in processes:
        if process.is_running():
            yield process


def _belongs(process: psutil.Process, directory: Path) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return environment(process.pid).get(MARK) == str(directory) or _writes_into(process, directory)
    except (psutil.Error, OSError):
        return False


def _writes_into(process: psutil.Process, directory: Path) -> bool:
    """A reader (`tail -f` of a log) is a guest, not one of the head's."""
    inside = f"{directory}{os.sep}"
    return any(file.path.startswith(inside) and getattr(file, "mode", "r") != "r" for file in process.open_files())


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []
