import errno

import pytest

from dpo_service.errors import NotFound, StorageFull, UserError
from dpo_service.storage import store as store_module
from dpo_service.storage.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "files/\0", "a/../../root2/x"])
def test_keys_that_lead_outside_are_refused(store, key):
    with pytest.raises(UserError):
        store.path(key)


def test_symlink_out_of_the_root_is_refused(store, tmp_path):
    store.root.mkdir()
    (store.root / "link").symlink_to(tmp_path)
    with pytest.raises(UserError):
        store.path("link/secret")


def test_write_replaces_whole(store):
    store.write("a/b", b"one")
    store.write("a/b", b"two")
    assert store.read("a/b") == b"two"
    assert [p.name for p in store.path("a").iterdir()] == ["b"]


def test_failed_write_leaves_the_old_content_and_no_temporary(store):
    store.write("a", b"old")
    with pytest.raises(RuntimeError), store.replacing("a") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert store.read("a") == b"old"
    assert [p.name for p in store.root.iterdir()] == ["a"]


def test_full_disk_is_the_users_error(store):
    with pytest.raises(StorageFull), store.replacing("a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(store.root.iterdir()) == []


def test_require_room_counts_the_reserve(store, monkeypatch):
    store.root.mkdir()
    usage = type("Usage", (), {"free": store_module.RESERVE_BYTES + 10})
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: usage)
    store.require_room(10)
    with pytest.raises(StorageFull, match="11 bytes"):
        store.require_room(11)


def test_publishing_is_all_or_nothing(store):
    with store.publishing("d") as directory:
        (directory / "x").write_text("1")
    with pytest.raises(RuntimeError), store.publishing("d") as directory:
        (directory / "x").write_text("2")
        raise RuntimeError
    assert store.read("d/x") == b"1"
    assert [p.name for p in store.root.iterdir()] == ["d"]


def test_reading_nothing_says_so(store):
    with pytest.raises(NotFound, match="a/b"):
        store.read("a/b")
