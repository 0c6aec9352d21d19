"""Submitting, listing, watching, cancelling."""

from __future__ import annotations

import json

import pytest

from dpo_service.cli.exits import ExitCode


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n')
    return str(path)


def test_submit_uploads_the_file_and_names_it_in_the_job(dpo, service, rows, capsys):
    assert dpo("submit", rows, "--model", "base", "--set", "beta=0.2", "--json") == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["id"] == "ftjob-1"
    (content,) = service.files.values()
    assert b'{"prompt": "a"}' in content
    assert b'filename="rows.jsonl"' in content
    assert b"fine-tune" in content
    document = next(
        body for method, path, body in service.requests if (method, path) == ("POST", "/v1/fine_tuning/jobs")
    )
    assert document["training_file"] == "file-1"
    assert document["method"]["dpo"]["hyperparameters"] == {"beta": 0.2}


def test_a_refused_job_leaves_no_upload_behind(dpo, service, rows, capsys):
    service.refuse_job = True
    assert dpo("submit", rows, "--model", "nobody") == ExitCode.REFUSED
    assert "no such model" in capsys.readouterr().err
    assert service.files == {}


def test_submit_and_watch_ends_with_the_jobs_own_end(dpo, service, rows, capsys):
    assert dpo("submit", rows, "--model", "base", "--watch") == ExitCode.OK
    assert "ft:base::1" in capsys.readouterr().out
    service.final, service.error = "failed", {"message": "the loss is not finite"}
    assert dpo("submit", rows, "--model", "base", "--watch") == ExitCode.FAILED
    assert "the loss is not finite" in capsys.readouterr().err


def test_watch_prints_every_event_once_as_json(dpo, service, capsys):
    assert dpo("watch", "ftjob-1", "--json") == ExitCode.OK
    shown = [json.loads(line)["sequence"] for line in capsys.readouterr().out.splitlines()]
    assert shown == [1, 2, 3, 4]


def test_watch_takes_up_a_broken_stream_without_repeating(dpo, service, capsys):
    service.stream_breaks, service.looks_until_end = 1, 4
    assert dpo("watch", "ftjob-1", "--json") == ExitCode.OK
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_watch_without_a_terminal_prints_plain_lines(dpo, capsys):
    assert dpo("watch", "ftjob-1") == ExitCode.OK
    shown = capsys.readouterr().err
    assert "Job created" in shown
    assert "validation at step 0: accuracy 0.5" in shown
    assert "step 1: loss 0.7" in shown


def test_an_unknown_job_is_refused(dpo, capsys):
    assert dpo("watch", "ftjob-2") == ExitCode.REFUSED


def test_jobs_logs_and_cancel(dpo, service, capsys):
    assert dpo("jobs") == ExitCode.OK
    assert "ftjob-1" in capsys.readouterr().out
    assert dpo("logs", "ftjob-1") == ExitCode.OK
    assert capsys.readouterr().out == "step 1\nstep 2\n"
    assert dpo("cancel", "ftjob-1") == ExitCode.OK
    assert ("POST", "/v1/fine_tuning/jobs/ftjob-1/cancel", {}) in service.requests


def test_pause_and_resume_say_how_the_job_is(dpo, service, capsys):
    service.state, service.looks_until_end = "pausing", 9
    assert dpo("pause", "ftjob-1") == ExitCode.OK
    assert capsys.readouterr().out == "Job ftjob-1 is asked to pause; it is pausing.\n"
    service.state = "paused"
    assert dpo("jobs") == ExitCode.OK
    assert "paused" in capsys.readouterr().out
    service.state = "submitting"
    assert dpo("resume", "ftjob-1") == ExitCode.OK
    assert capsys.readouterr().out == "Job ftjob-1 is asked to resume; it is running.\n"
    assert dpo("resume", "ftjob-1", "--json") == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["state"] == "submitting"
    asked = [path.rpartition("/")[2] for method, path, _ in service.requests if method == "POST"]
    assert asked == ["pause", "resume", "resume"]


def test_metrics_of_a_job_as_a_table_and_as_lines(dpo, service, capsys):
    service.events.append({**service.events[0], "level": "warn", "message": "Exploding gradients", "id": "ftevent-9"})
    assert dpo("metrics", "ftjob-1") == ExitCode.OK
    printed = capsys.readouterr()
    assert "0.7" in printed.out
    assert "Warning: Exploding gradients" in printed.err
    assert dpo("metrics", "ftjob-1", "--json") == ExitCode.OK
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["split"], line["step"]) for line in lines] == [("eval", 0), ("train", 1), ("train", 2)]
