"""`dpo data check`."""

from __future__ import annotations

import json

import pytest

from dpo_service.cli.app import run
from dpo_service.cli.cmd_data import length_bar
from dpo_service.cli.exits import ExitCode
from dpo_service.manifests.dataset import LengthStats


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": "No."} for n in range(5)]
    return written(tmp_path / "pairs.jsonl", [*rows, rows[0]])


def test_the_report_counts_what_is_left_out(pairs, capsys):
    assert run(["data", "check", pairs, "--json"]) == ExitCode.OK
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["kept"]) == (6, 5)
    assert run(["data", "check", pairs]) == ExitCode.OK
    shown = " ".join(capsys.readouterr().out.split())
    assert "6 rows, 5 to train on" in shown
    assert "duplicate" in shown


def test_a_bad_row_is_refused_with_its_line(tmp_path, capsys):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}]
    assert run(["data", "check", written(tmp_path / "x.jsonl", rows)]) == ExitCode.REFUSED
    assert "line 2" in capsys.readouterr().err


def test_usage_errors(tmp_path, pairs, capsys):
    assert run(["data", "check", str(tmp_path / "none.jsonl")]) == ExitCode.USAGE
    assert run(["data", "check", pairs, "--truncation", "chop"]) == ExitCode.USAGE
    assert run(["data", "check", pairs, "--model", str(tmp_path)]) == ExitCode.USAGE


def test_a_length_bar_marks_median_most_and_longest():
    assert length_bar(LengthStats(mean=5, p50=10, p95=20, max=40), 40) == "█" * 10 + "▓" * 10 + "░" * 20
    assert length_bar(LengthStats(mean=5, p50=10, p95=20, max=20), 40) == "█" * 10 + "▓" * 10
