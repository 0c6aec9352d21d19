"""The turn to gather samplers and workers: one holds it, and it goes with the process that does."""

from __future__ import annotations

import subprocess
import sys

from dpo_service.online.turn import Turn


def test_one_has_it_at_a_time(tmp_path):
    one, other = Turn(tmp_path / "cache" / "lock"), Turn(tmp_path / "cache" / "lock")
    assert one.take()
    assert one.take(), "it has it"
    assert not other.take()
    one.give_back()
    one.give_back()
    assert other.take()
    assert not one.take()
    other.give_back()


def test_a_killed_holder_gives_it_back(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from dpo_service.online.turn import Turn; "
        f"turn = Turn(Path({str(tmp_path / 'lock')!r})); print(turn.take(), flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "True\n"
        assert not Turn(tmp_path / "lock").take()
    finally:
        holder.kill()
        holder.wait()
    assert Turn(tmp_path / "lock").take()
