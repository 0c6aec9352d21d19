"""Models, deployments and chat."""

from __future__ import annotations

import io
import json

from dpo_service.cli.exits import ExitCode


def test_deploy_waits_until_the_model_runs(dpo, service, capsys):
    assert dpo("deploy", "base", "--wait", "--json") == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["status"] == "running"
    assert service.deployment_states == []


def test_a_deployment_that_fails_says_why(dpo, service, capsys):
    service.deployment_states = ["starting", "failed"]
    assert dpo("deploy", "base", "--wait") == ExitCode.FAILED
    assert "out of memory" in capsys.readouterr().err


def test_models_are_listed_with_what_is_served(dpo, service, capsys):
    service.deployments = [{"id": "dep-1", "model": "base", "status": "running"}]
    assert dpo("models", "--json") == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["deployment"] == "running"
    assert dpo("models") == ExitCode.OK
    assert "running" in capsys.readouterr().out


def test_undeploy_finds_the_deployment_by_model(dpo, service, capsys):
    service.deployments = [{"id": "dep-1", "model": "base", "status": "running"}]
    assert dpo("undeploy", "base") == ExitCode.OK
    assert service.deployments == []
    assert dpo("undeploy", "base") == ExitCode.REFUSED


def test_one_question_is_streamed(dpo, service, capsys):
    assert dpo("chat", "base", "Hi", "--system", "Be brief", "--max-tokens", "9") == ExitCode.OK
    assert capsys.readouterr().out == "Hello.\n"
    _, _, body = service.requests[-1]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert (body["max_tokens"], body["stream"]) == (9, True)


def test_one_question_as_json_is_the_whole_answer(dpo, capsys):
    assert dpo("chat", "base", "Hi", "--json") == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["choices"][0]["message"]["content"] == "Hello."


def test_a_conversation_remembers_until_it_starts_over(dpo, service, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/new\nthree\n/quit\nfour\n"))
    assert dpo("chat", "base") == ExitCode.OK
    asked = [
        [m["content"] for m in body["messages"]] for _, path, body in service.requests if path.endswith("completions")
    ]
    assert asked == [["one"], ["one", "Hello.", "two"], ["three"]]
