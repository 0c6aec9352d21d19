"""The pieces of the demo around the jobs: own files, ports, documents, the tables."""

from __future__ import annotations

import json
import socket

import pytest

from dpo_service.cli.app import run
from dpo_service.cli.exits import CliError, ExitCode
from dpo_service.demo import report
from dpo_service.demo.corpus import Task
from dpo_service.demo.own import UNLIMITED, context_of, divide
from dpo_service.demo.service import free_port
from dpo_service.demo.story import _one_a_family, job_of
from dpo_service.specs.job import JobSpec


def pairs_file(path, count):
    rows = [{"prompt": f"Question {n}?", "chosen": f"Yes {n}.", "rejected": "No."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return path.read_text().splitlines()


def test_own_rows_are_divided_without_loss_or_overlap(tmp_path):
    file = pairs_file(tmp_path / "pairs.jsonl", 100)
    own = divide(file, tmp_path / "out")
    assert (own.rows, own.held_out_rows) == (95, 5)
    assert sorted(lines(own.training) + lines(own.held_out)) == sorted(json.dumps(json.loads(x)) for x in lines(file))
    assert not set(lines(own.training)) & set(lines(own.held_out))
    assert own.questions[0] == [{"role": "user", "content": "Question 0?"}]
    assert divide(pairs_file(tmp_path / "many.jsonl", 5000), tmp_path / "out").held_out_rows == 32


def test_own_files_without_pairs_are_refused_with_the_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(CliError) as caught:
        divide(tmp_path / "bad.jsonl", tmp_path)
    assert caught.value.code == ExitCode.REFUSED
    with pytest.raises(CliError, match="too few"):
        divide(pairs_file(tmp_path / "few.jsonl", 3), tmp_path)


def test_a_short_model_is_known_by_its_configuration(tmp_path):
    assert context_of(None) == context_of(tmp_path) == UNLIMITED
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 256}')
    assert context_of(tmp_path) == 256


def test_the_demos_jobs_are_jobs():
    for config in ("demo-supervised", "demo-dpo", "demo-own"):
        job = job_of(config, model="m", training_file="file-1")
        assert JobSpec.model_validate(job).training_file == "file-1"
    with pytest.raises(CliError, match="checkout"):
        job_of("no-such-config")


def test_a_model_without_data_is_a_usage_error(tmp_path, capsys):
    assert run(["demo", "--model", "m", "--data-dir", str(tmp_path / "d")]) == ExitCode.USAGE
    assert "DATA" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_a_taken_port_is_passed_over():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert free_port(number) != number
    assert free_port(number) == number


def test_samples_are_the_first_of_each_family():
    tasks = tuple(Task(family, f"p{n}", "g", "b") for n, family in enumerate("aabca"))
    samples = _one_a_family(tasks, list("vwxyz"), list("VWXYZ"))
    assert [(s.prompt, s.base, s.tuned) for s in samples] == [("p0", "v", "V"), ("p2", "x", "X"), ("p3", "y", "Y")]


def outcome(**changes):
    values = {
        "base_model": "ft:b::1",
        "tuned_model": "ft:b::2",
        "held_out_pairs": 300,
        "accuracy_before": 0.5,
        "accuracy_after": 0.93,
        "margin_before": 0.0,
        "margin_after": 2.79,
        "judged": 80,
        "good_before": 0.425,
        "good_after": 0.85,
        "samples": (report.Sample("Say [red] cup", "x" * 900, "cup"),),
        "seconds": 301.0,
    }
    return report.Outcome(**{**values, **changes})


def test_the_table_shows_before_and_after(capsys):
    report.show(outcome())
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("reward accuracy 0.50 0.93", "reward margin 0.00 2.79", "(80 prompts) 42% 85%", "Say [red] cup"):
        assert words in shown
    assert "x" * 301 not in shown.replace(" ", "")


def test_without_a_judge_there_is_no_line_of_it(capsys):
    report.show(outcome(judged=0, good_before=None, good_after=None))
    assert "judge" not in capsys.readouterr().out


def test_the_end_says_how_to_go_on(capsys):
    report.show_next_steps(outcome(), "http://127.0.0.1:8000", "data")
    shown = capsys.readouterr().out
    for words in ("Done in 5:01", "dpo chat ft:b::2", "dpo submit FILE", "dpo down --data-dir data"):
        assert words in shown
