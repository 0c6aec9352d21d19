"""Ends what belongs to one head and nothing else; the processes here are plain Pythons standing in for Ray's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest

from dpo_service.cluster import processes

SLEEPS = "print('ready', flush=True); import time; time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}"
PARENT = f"import os; pid = os.fork(); {SLEEPS}"


@pytest.fixture
def spawn() -> Iterator:
    started: list[psutil.Process] = []

    def start(code: str, *arguments: str, mark: Path | None = None, overwritten: bool = False) -> psutil.Process:
        environment = {} if overwritten else {"PATH": os.environ["PATH"]}
        if mark is not None:
            environment[processes.MARK] = str(mark)
        command = [sys.executable, "-c", code, *arguments]
        child = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
        assert child.stdout.readline() == b"ready\n"
        started.extend([child, *child.children()])
        return child

    yield start
    for process in started:
        if process.is_running():
            process.kill()
    psutil.wait_procs(started, 5)


def _alive(process: psutil.Process) -> bool:
    return processes.started_at(process.pid) is not None


def test_the_marked_their_children_and_the_deaf_end(spawn, tmp_path):
    head = tmp_path / "head"
    marked, deaf, parent = spawn(SLEEPS, mark=head), spawn(DEAF, mark=head), spawn(PARENT, mark=head)
    child = parent.children()[0]
    processes.end(head)
    assert [_alive(each) for each in (marked, deaf, parent, child)] == [False] * 4
    assert processes.belonging(head) == []


def test_another_heads_processes_and_guests_are_spared(spawn, tmp_path):
    head = tmp_path / "head"
    head.mkdir()
    log = head / "raylet.out"
    log.touch()
    writes = f"import sys; file = open(sys.argv[1], 'a'); {SLEEPS}"
    worker, notebook = spawn(writes, str(log), overwritten=True), spawn(writes, str(log))
    reader = spawn(f"import sys; file = open(sys.argv[1]); {SLEEPS}", str(log), overwritten=True)
    other = spawn(SLEEPS, mark=tmp_path / "head2")
    processes.end(head)
    assert [_alive(each) for each in (worker, notebook, reader, other)] == [False, True, True, True]


def test_shared_memory_of_the_killed_is_removed_unless_somebody_else_maps_it(spawn, tmp_path):
    own, common = (shared_memory.SharedMemory(create=True, size=64) for _ in range(2))
    names = [Path("/dev/shm") / block.name for block in (own, common)]
    own.close()
    maps = (
        "import mmap, sys; files = [open(name, 'r+b') for name in sys.argv[1:]];"
        f"maps = [mmap.mmap(file.fileno(), 64) for file in files]; {SLEEPS}"
    )
    try:
        spawn(maps, *map(str, names), mark=tmp_path / "head")
        processes.end(tmp_path / "head")
        assert [name.exists() for name in names] == [False, True]
    finally:
        common.close()
        common.unlink()


def test_ending_nothing_is_fine(tmp_path):
    before = time.monotonic()
    processes.end(tmp_path / "head")
    assert time.monotonic() - before < processes.GRACE_S


def test_a_process_is_known_by_its_start_and_a_dead_one_by_none(spawn):
    child = spawn(SLEEPS)
    assert processes.started_at(child.pid) == child.create_time()
    child.kill()
    child.wait()
    assert processes.started_at(child.pid) is None
