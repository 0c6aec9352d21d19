"""`dpo data check`."""

from __future__ import annotations

import json

import pytest

from dpo_service.cli.app import run
from dpo_service.cli.cmd_data import length_bar
from dpo_service.cli.exits import ExitCode
from dpo_service.manifests.dataset import LengthStats
from tests.models import save_tokenizer

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 400}


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


def test_lengths_are_held_to_what_a_job_with_this_model_would_have(tmp_path, capsys):
    model = tmp_path / "model"
    save_tokenizer(model)
    rows = [{"prompt": f"{n}?", "chosen": "yes " * 300, "rejected": "no"} for n in range(3)]
    file = written(tmp_path / "x.jsonl", rows)
    (model / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 128}))
    assert run(["data", "check", file, "--model", str(model)]) == ExitCode.REFUSED
    assert "max_length is 128" in capsys.readouterr().err
    assert run(["data", "check", file, "--model", str(model), "--max-length", "2000"]) == ExitCode.OK
    (model / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 32_000}))
    assert run(["data", "check", file, "--model", str(model), "--json"]) == ExitCode.OK


def test_usage_errors(tmp_path, pairs, capsys):
    assert run(["data", "check", str(tmp_path / "none.jsonl")]) == ExitCode.USAGE
    assert run(["data", "check", pairs, "--truncation", "chop"]) == ExitCode.USAGE
    assert run(["data", "check", pairs, "--model", str(tmp_path)]) == ExitCode.USAGE
    assert f"--model {tmp_path}" in capsys.readouterr().err


def test_a_length_bar_marks_median_most_and_longest():
    assert length_bar(LengthStats(mean=5, p50=10, p95=20, max=40), 40) == "█" * 10 + "▓" * 10 + "░" * 20
    assert length_bar(LengthStats(mean=5, p50=10, p95=20, max=20), 40) == "█" * 10 + "▓" * 10
