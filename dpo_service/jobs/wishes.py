"""What every wish of a user about a job begins with: the job, locked, and not ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.db.session import Database
from dpo_service.errors import Conflict
from dpo_service.jobs.repository import get_job
from dpo_service.jobs.states import TERMINAL, State
from dpo_service.jobs.tables import Job


@asynccontextmanager
async def unended(database: Database, job_id: str, wish: str) -> AsyncIterator[tuple[AsyncSession, Job]]:
    """A transaction that holds the job's row. `wish` is what was to be done to it, as a participle.

    Raises:
        NotFound: no such job.
        Conflict: it has ended.
    """
    async with database.begin() as session:
        job = await get_job(session, job_id, lock=True)
        if job.job_state in TERMINAL:
            ended = "been cancelled already" if job.job_state is State.CANCELLED else f"{job.state} already"
            raise Conflict(f"job {job_id!r} has {ended}; only a job that has not ended can be {wish}")
        yield session, job
