"""What `dpo up` does before and around serving; the service itself is tried in tests/e2e."""

import socket

import pytest

from dpo_service import main
from dpo_service.api.uploads import ARRIVING, sweep_unfinished
from dpo_service.settings import Settings
from dpo_service.storage.store import Store


def test_nobody_holds_a_new_directory_and_a_holder_is_named(tmp_path):
    assert main.holder(tmp_path) is None
    with main._held(tmp_path) as lock:
        assert lock is not None
        (tmp_path / "service.json").write_text('{"pid": 4711, "url": "http://127.0.0.1:9"}')
        assert main.holder(tmp_path) == {"pid": 4711, "url": "http://127.0.0.1:9"}
    assert main.holder(tmp_path) is None


def test_a_holder_that_is_still_starting_is_not_taken_for_nobody(tmp_path, capsys):
    with main._held(tmp_path):
        assert main._report_holder(tmp_path) == main.EXIT_HELD
    assert "starting" in capsys.readouterr().err


def test_uploads_that_died_with_the_process_are_swept_and_nothing_else(tmp_path):
    store = Store(tmp_path)
    store.write(f"files/file-1/{ARRIVING}", b"half")
    store.write("files/file-2/pairs.jsonl", b"whole")
    sweep_unfinished(store)
    assert [path.name for path in store.path("files").iterdir()] == ["file-2"]


def test_open_addresses_without_keys_do_not_start(monkeypatch, capsys):
    monkeypatch.setenv("DPO_HOST", "0.0.0.0")
    monkeypatch.delenv("DPO_API_KEYS", raising=False)
    assert main.main(["up"]) == 2
    assert "DPO_API_KEYS" in capsys.readouterr().err


@pytest.mark.parametrize("cluster", ["local", "fake"])
def test_a_port_that_is_taken_is_said_before_anything_is_started(tmp_path, capsys, cluster):
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = Settings(data_dir=tmp_path, port=other.getsockname()[1], cluster=cluster)
        assert main.up(settings) == main.EXIT_FAILED
    said = capsys.readouterr().err
    assert f"port {settings.port}" in said
    assert "--port" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "service.lock"]


def test_down_makes_no_directory(tmp_path, capsys):
    assert main.down(tmp_path / "none") == main.EXIT_FAILED
    assert "no such directory" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
