"""Uploaded files as rows."""

from datetime import UTC, datetime, timedelta

import pytest

from dpo_service.db.session import Database
from dpo_service.errors import NotFound, UserError
from dpo_service.registry import files
from dpo_service.registry.tables import File
from tests.databases import make_tables

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
async def database(tmp_path):
    made = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db")
    await make_tables(made)
    yield made
    await made.close()


def file(name, **fields):
    values = {"name": "a.jsonl", "bytes": 1, "purpose": "fine-tune", "created_at": NOW, "status": "processed"}
    return File(id=name, key=f"files/{name}/a.jsonl", sha256="0" * 64, **values | fields)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("pairs.jsonl.gz", "pairs.jsonl.gz"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\a b.json", "a b.json"),
        ("a\r\nSet-Cookie: x", "a__Set-Cookie_ x"),
        ("..", "file"),
        (".hidden", "hidden"),
        ("", "file"),
        (None, "file"),
        ("nul\0byte", "nul_byte"),
        ("Füße.jsonl", "Füße.jsonl"),
    ],
)
def test_safe_name(given, kept):
    assert files.safe_name(given) == kept


@pytest.mark.parametrize("character", ["x", "ü", "字"])
def test_long_name_keeps_its_ending(character):
    name = files.safe_name(character * 500 + ".jsonl.gz")
    assert name.startswith(character)
    assert name.endswith(".jsonl.gz")
    assert len(name.encode()) <= files.MAX_NAME


async def test_expired_file_is_not_found_but_still_listed_for_the_sweep(database):
    async with database.begin() as session:
        await files.create(session, file("f1", expires_at=NOW + timedelta(hours=1)))
    later = NOW + timedelta(hours=1)
    async with database.begin() as session:
        assert (await files.get(session, "f1", now=NOW)).id == "f1"
        with pytest.raises(NotFound, match="f1"):
            await files.get(session, "f1", now=later)
        assert (await files.list_files(session, now=later))[0] == []
        assert [row.id for row in await files.expired(session, now=later)] == ["f1"]
        assert await files.expired(session, now=NOW) == []


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_cover_rows_of_the_same_moment_once(database, order):
    names = [f"f{number}" for number in range(5)]
    async with database.begin() as session:
        for name in names:
            await files.create(session, file(name))
    seen, after, more = [], None, True
    while more:
        async with database.begin() as session:
            rows, more = await files.list_files(session, now=NOW, after=after, limit=2, order=order)
        seen += [row.id for row in rows]
        after = seen[-1]
    assert seen == (names if order == "asc" else names[::-1])


async def test_unknown_cursor_is_refused(database):
    async with database.begin() as session:
        with pytest.raises(UserError, match="nope"):
            await files.list_files(session, now=NOW, after="nope")
