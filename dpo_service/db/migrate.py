"""Brings a database to the newest schema. Safe to run by several processes at once: one works, the others wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url

from dpo_service.db.session import Database

MIGRATIONS = Path(__file__).parent / "migrations"
_PG_LOCK = 0x64706F  # "dpo"


def upgrade(url: str, revision: str = "head") -> None:
    """Apply what is missing, all of it or nothing. Blocks; call it where no event loop runs, or in a thread."""
    _make_directory(url)
    _with_config(url, lambda config: command.upgrade(config, revision))


def downgrade(url: str, revision: str) -> None:
    """Go back to `revision` ("base" = an empty database)."""
    _with_config(url, lambda config: command.downgrade(config, revision))


def check(url: str) -> None:
    """Raises alembic.util.CommandError when the database's schema is not what the tables in the code say."""
    _with_config(url, command.check)


def _with_config(url: str, action: Callable[[Config], None]) -> None:
    def with_connection(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        action(config)

    async def run() -> None:
        database = Database(url)
        try:
            # On SQLite the transaction begins with the write lock (BEGIN IMMEDIATE): that is the lock.
            async with database.engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    await connection.execute(text(f"SELECT pg_advisory_xact_lock({_PG_LOCK})"))
                await connection.run_sync(with_connection)
        finally:
            await database.close()

    asyncio.run(run())


def _make_directory(url: str) -> None:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
