"""What `dpo up` does before and around serving; the service itself is tried in tests/e2e."""

from dpo_service import main
from dpo_service.api.uploads import ARRIVING, sweep_unfinished
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
