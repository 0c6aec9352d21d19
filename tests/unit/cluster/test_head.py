from __future__ import annotations

import os
import socket
import stat
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dpo_service.cluster import head, processes
from dpo_service.cluster.head import Head, HeadState, Ports
from dpo_service.errors import ClusterError

PORTS = Ports(gcs=20001, dashboard=20002, agent=20003, client=20004, metrics=20005, serve=20006)


def test_each_data_directory_has_its_own_short_temporary_one(tmp_path):
    first, second = Head(tmp_path / "a").temp_dir, Head(tmp_path / "b").temp_dir
    assert first != second
    assert first == Head(tmp_path / "x" / ".." / "a").temp_dir
    assert len(os.fsencode(first)) < 40


def test_a_long_temporary_folder_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / ("long" * 10)))
    assert Head(tmp_path).temp_dir.parent == Path("/tmp").resolve()


def test_the_temporary_directory_is_ours_alone_or_refused(tmp_path):
    path = tmp_path / "dpo-1"
    head._own_directory(path)
    head._own_directory(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    trap = tmp_path / "dpo-2"
    trap.symlink_to(path)
    with pytest.raises(ClusterError, match="belongs to somebody else"):
        head._own_directory(trap)


def test_the_token_is_private_and_stays_the_same(tmp_path):
    token = tmp_path / "token"
    head._write_token(token)
    first = token.read_text()
    head._write_token(token)
    assert token.read_text() == first
    assert len(first) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_remembered_ports_are_kept_while_they_are_free():
    known = head._ports(None, None)
    assert len(set(asdict(known).values())) == 6
    assert head._ports(known, None) == known
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", known.dashboard))
        taken.listen()
        assert head._ports(known, None).dashboard != known.dashboard


def test_a_wanted_serve_port_is_taken_literally():
    known = head._ports(None, 20123)
    assert known.serve == 20123
    assert head._ports(known, 20124).serve == 20124


def test_a_head_needs_both_daemons_and_the_very_ones(tmp_path):
    me, began = os.getpid(), processes.started_at(os.getpid())
    assert began is not None
    state = HeadState({"gcs_server": me, "raylet": me}, {"gcs_server": began, "raylet": began}, PORTS)
    assert state.alive
    assert not replace(state, started={"gcs_server": began, "raylet": began - 1}).alive


def test_jobs_inherit_the_way_to_the_head_but_not_the_services_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_API_KEYS", '["sk-secret"]')
    monkeypatch.setenv("DPO_DATABASE_URL", "postgresql+asyncpg://user:secret@db/dpo")
    monkeypatch.setenv("RAY_ADDRESS", "http://another:8265")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ours = Head(tmp_path)
    environment = ours._daemon_environment(PORTS)
    assert "secret" not in " ".join(environment.values())
    assert "RAY_ADDRESS" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path.resolve() / "ray" / "token")
    assert environment[processes.MARK] == str(ours.temp_dir)


def test_state_is_read_back_and_absent_before_the_first_start(tmp_path):
    ours = Head(tmp_path)
    assert ours.state() is None
    ours.folder.mkdir()
    state = HeadState({"gcs_server": 1, "raylet": 2}, {"gcs_server": 1.5, "raylet": 2.5}, PORTS)
    head._write(ours.folder / "state.json", head.orjson.dumps(asdict(state)))
    assert ours.state() == state
    assert state.dashboard == "http://127.0.0.1:20002"


def test_a_head_that_does_not_start_says_what_ray_said(tmp_path, monkeypatch):
    monkeypatch.setattr(head, "_command", lambda *_: ["/bin/sh", "-c", "echo first; echo no room; exit 3"])
    ours = Head(tmp_path)
    (tmp_path / "ray" / "gcs").mkdir(parents=True)
    with pytest.raises(ClusterError, match=r"exit 3.*no room"):
        ours.ensure()
    assert not (tmp_path / "ray" / "gcs").exists()
    ours.end()
    assert not ours.temp_dir.exists()
    assert not ours.folder.exists()
