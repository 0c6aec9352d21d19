"""`make demo-online`, as a user runs it: minutes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LIMIT_S = 600


def dpo(*arguments, timeout):
    command = [sys.executable, "-m", "dpo_service.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(3 * LIMIT_S)
def test_the_online_demo_teaches_lists_in_ten_minutes(tmp_path):
    data = ("--data-dir", str(tmp_path / "data"))
    try:
        ran = dpo("demo-online", "--json", *data, timeout=2 * LIMIT_S)
        assert ran.returncode == 0, ran.stderr
        told = json.loads(ran.stdout)
        assert told["seconds"] < LIMIT_S
        assert 0.1 < told["before"] < 0.4
        assert told["after"] > told["before"] + 0.35
        assert (tmp_path / "data" / "demo" / "online.png").exists()
        samples = dpo("samples", told["job"], "--json", *data, timeout=60)
        assert len(samples.stdout.splitlines()) == 5
    finally:
        dpo("down", *data, timeout=120)
