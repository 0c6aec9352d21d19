from __future__ import annotations

import asyncio
from pathlib import Path

from sqlalchemy import text

from dpo_service.db.session import Database


async def test_many_writers_at_once_all_get_their_turn_in_order(tmp_path: Path) -> None:
    """SQLite alone lets some of them starve, until they fail with "database is locked"."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/a.db")
    async with database.begin() as session:
        await session.execute(text("CREATE TABLE seen (position INTEGER PRIMARY KEY, writer INTEGER)"))

    async def write(number: int) -> None:
        async with database.begin() as session:
            await session.execute(text(f"INSERT INTO seen (writer) VALUES ({number})"))

    await asyncio.gather(*(write(number) for number in range(100)))
    async with database.begin() as session:
        writers = list(await session.scalars(text("SELECT writer FROM seen ORDER BY position")))
    await database.close()
    assert writers == list(range(100))
