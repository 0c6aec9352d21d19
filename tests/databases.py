"""Empty databases with every table. On SQLite they are made once and copied: making them is slower than most tests."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

import dpo_service.deployments.tables
import dpo_service.jobs.tables
import dpo_service.registry.tables  # noqa: F401
from dpo_service.db.base import Base
from dpo_service.db.session import Database


async def make_tables(database: Database) -> None:
    """Give a database that nothing has connected to yet its tables."""
    url = make_url(database.url)
    if url.get_backend_name() == "sqlite":
        assert url.database is not None
        Path(url.database).write_bytes(_empty_sqlite())
        return
    async with database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


@cache
def _empty_sqlite() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        engine = create_engine(f"sqlite:///{directory}/empty.db")
        with engine.begin() as connection:
            connection.execute(text("PRAGMA journal_mode=WAL"))
        Base.metadata.create_all(engine)
        engine.dispose()
        return Path(directory, "empty.db").read_bytes()
