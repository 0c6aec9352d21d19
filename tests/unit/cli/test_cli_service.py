"""`dpo up`, `dpo down` and `dpo doctor`."""

from __future__ import annotations

import json
import sqlite3
import sys
import types

import pytest

from dpo_service.cli.app import run
from dpo_service.cli.cmd_doctor import examine
from dpo_service.cli.exits import ExitCode


@pytest.fixture
def calls(monkeypatch):
    """A composition root that notes how it was called and starts nothing."""
    seen: list[tuple] = []
    fake = types.ModuleType("dpo_service.main")

    def up(settings, *, detach):
        seen.append((settings, detach))
        settings.data_dir.mkdir(exist_ok=True)
        (settings.data_dir / "service.json").write_text(json.dumps({"url": f"http://127.0.0.1:{settings.port}"}))
        print("ready")
        return 5 if settings.port == 5555 else 0

    fake.up = up
    fake.down = lambda data_dir: seen.append((data_dir,)) or 0
    monkeypatch.setitem(sys.modules, "dpo_service.main", fake)
    monkeypatch.setattr("dpo_service.main", fake, raising=False)
    return seen


def test_options_come_before_the_environment(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_PORT", "8111")
    monkeypatch.setenv("DPO_HOST", "127.0.0.1")
    assert run(["up", "--data-dir", str(tmp_path), "-d"]) == ExitCode.OK
    assert run(["up", "--data-dir", str(tmp_path), "--port", "8222"]) == ExitCode.OK
    assert [(settings.port, detach) for settings, detach in calls] == [(8111, True), (8222, False)]
    assert calls[0][0].data_dir == tmp_path


def test_a_held_directory_has_its_own_exit_code(calls, tmp_path):
    assert run(["up", "--data-dir", str(tmp_path), "--port", "5555"]) == ExitCode.HELD


def test_with_json_only_the_service_is_on_stdout(calls, tmp_path, capsys):
    assert run(["up", "-d", "--json", "--data-dir", str(tmp_path), "--port", "8222"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == {"url": "http://127.0.0.1:8222"}


def test_an_open_address_without_keys_is_a_usage_error(calls, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DPO_API_KEYS", raising=False)
    assert run(["up", "--host", "0.0.0.0", "--data-dir", str(tmp_path)]) == ExitCode.USAGE
    assert "DPO_API_KEYS" in capsys.readouterr().err
    assert calls == []


def test_down_is_told_the_directory(calls, tmp_path):
    assert run(["down", "--data-dir", str(tmp_path)]) == ExitCode.OK
    assert calls == [(tmp_path,)]


def test_doctor_reports_each_part_of_a_running_service(dpo, tmp_path, capsys):
    dpo("doctor", "--data-dir", str(tmp_path), "--json")
    found = {item["what"]: item for item in map(json.loads, capsys.readouterr().out.splitlines())}
    assert found["service: database"]["ok"]
    assert found["service: cluster"]["detail"] == "ok"
    assert "ray" in found["packages"]["detail"]


def test_doctor_finds_a_broken_database(tmp_path):
    (tmp_path / "service.db").write_bytes(b"not a database" * 100)
    found = {finding.what: finding for finding in examine(tmp_path)}
    assert not found["database"].ok
    (tmp_path / "service.db").unlink()
    sqlite3.connect(tmp_path / "service.db").execute("create table t (x)").connection.commit()
    assert {finding.what: finding for finding in examine(tmp_path)}["database"].ok


def test_doctor_says_when_the_port_is_free(tmp_path, capsys, unused_tcp_port):
    run(["doctor", "--data-dir", str(tmp_path), "--url", f"http://127.0.0.1:{unused_tcp_port}"])
    assert "port is free" in " ".join(capsys.readouterr().out.split())
