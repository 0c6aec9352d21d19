"""The migrations make the schema that the tables in the code describe, on both engines, one process at a time."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from dpo_service.db import migrate
from dpo_service.db.session import Database

POSTGRES = os.environ.get("DPO_TEST_POSTGRES_URL")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path}/new/service.db"
        return
    if not POSTGRES:
        pytest.skip("DPO_TEST_POSTGRES_URL names no PostgreSQL to test on")
    name = f"dpo_{uuid.uuid4().hex[:10]}"
    asyncio.run(_execute(POSTGRES, f"CREATE DATABASE {name}"))
    yield f"{POSTGRES.rsplit('/', 1)[0]}/{name}"
    asyncio.run(_execute(POSTGRES, f"DROP DATABASE {name} WITH (FORCE)"))


async def _execute(url: str, statement: str) -> None:
    database = Database(url)
    async with database.engine.connect() as connection:
        if url.startswith("postgresql"):  # CREATE DATABASE runs in no transaction
            await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text(statement))
        await connection.commit()
    await database.close()


def table_names(url: str) -> set[str]:
    async def read() -> set[str]:
        database = Database(url)
        async with database.engine.connect() as connection:
            names = await connection.run_sync(lambda c: inspect(c).get_table_names())
        await database.close()
        return set(names)

    return asyncio.run(read())


def test_an_upgraded_database_is_what_the_tables_say(url: str) -> None:
    migrate.upgrade(url)
    migrate.check(url)
    assert {"jobs", "job_events", "job_attempts", "job_checkpoints", "files", "models", "deployments"} <= table_names(
        url
    )


def test_check_sees_a_column_that_is_missing(url: str) -> None:
    migrate.upgrade(url)
    asyncio.run(_execute(url, "ALTER TABLE jobs DROP COLUMN trained_tokens"))
    with pytest.raises(Exception, match="trained_tokens"):
        migrate.check(url)


def test_up_down_up(url: str) -> None:
    migrate.upgrade(url)
    migrate.downgrade(url, "base")
    assert table_names(url) == {"alembic_version"}
    migrate.upgrade(url)
    migrate.check(url)


def test_attempts_of_before_pauses_count_as_failures(url: str) -> None:
    migrate.upgrade(url, "0002")
    empty = "'2026-01-01 00:00:00+00', '{}', '{}', false"
    jobs = [("'new'", "'queued'", 0), ("'waits'", "'queued'", 2), ("'runs'", "'running'", 2)]
    values = ", ".join(f"({job_id}, {state}, {attempt}, {empty})" for job_id, state, attempt in jobs)
    asyncio.run(_execute(url, f"INSERT INTO jobs (id, state, attempt, created_at, spec, run, deploy) VALUES {values}"))
    migrate.upgrade(url)

    async def failures() -> dict[str, int]:
        database = Database(url)
        async with database.begin() as session:
            rows = (await session.execute(text("SELECT id, failures FROM jobs"))).all()
        await database.close()
        return {row[0]: row[1] for row in rows}

    assert asyncio.run(failures()) == {"new": 0, "waits": 2, "runs": 1}


def test_a_second_upgrade_changes_nothing(url: str) -> None:
    migrate.upgrade(url)
    insert = "INSERT INTO models VALUES ('m', 'b', 'j', 1, 'k', 'd', '2026-01-01 00:00:00+00', 'o')"
    asyncio.run(_execute(url, insert))
    migrate.upgrade(url)

    async def count() -> int:
        database = Database(url)
        async with database.begin() as session:
            found = await session.scalar(text("SELECT count(*) FROM models"))
        await database.close()
        return int(found or 0)

    assert asyncio.run(count()) == 1


def test_processes_that_migrate_at_once_all_succeed(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=migrate.upgrade, args=(url,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    migrate.check(url)
