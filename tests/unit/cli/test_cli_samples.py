"""`dpo samples` against a service; how a sample is drawn is in tests/api/test_samples.py."""

from __future__ import annotations

import json

from dpo_service.cli.exits import ExitCode


def test_every_prompt_is_a_line_of_json_up_to_the_limit(dpo, service, capsys):
    service.samples = [{"id": f"1-{number}"} for number in range(5)]
    assert dpo("samples", "ftjob-1", "--limit", "3", "--json") == ExitCode.OK
    shown = [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["1-0", "1-1", "1-2"]


def test_a_job_without_samples_says_why(dpo, capsys):
    assert dpo("samples", "ftjob-1") == ExitCode.OK
    assert "samples nothing: method dpo trains on the answers of its file" in capsys.readouterr().out
