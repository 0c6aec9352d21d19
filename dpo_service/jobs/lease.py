"""Who may work on a job: the owner whose token stands in its row, until the lease runs out by the database's clock.

    claim ──> work outside transactions ──> guarded(...): UPDATE ... WHERE lease_token = mine ──> release
                 └── renewing: every third of the lease

A reconciler that stalled for longer than its lease finds its token gone, and changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, CursorResult, and_, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.db.session import Database
from dpo_service.db.time import DatabaseTime
from dpo_service.jobs.states import ON_CLUSTER, State
from dpo_service.jobs.tables import Job, JobAttempt

logger = logging.getLogger(__name__)
BATCH = 1000


class StaleLease(Exception):
    """Somebody else owns the job now."""


@dataclass(frozen=True)
class Owned:
    """A job this process may work on, as it was when it was claimed, with its newest attempt."""

    job: Job
    attempt: JobAttempt | None
    token: str


async def claim(
    session: AsyncSession, token: str, *, lease_s: float, now: datetime, max_running: int
) -> Sequence[Owned]:
    """Lease every job on the cluster, and as many of the queued ones that are due, oldest first, as may start."""
    chosen = await _claimable(session, ON_CLUSTER, BATCH)
    places = max_running - await count_on_cluster(session)
    if places > 0:
        due = or_(Job.not_before.is_(None), Job.not_before <= now)
        chosen += await _claimable(session, {State.QUEUED}, places, due)
    if not chosen:
        return []
    until = DatabaseTime(lease_s)
    await session.execute(update(Job).where(Job.id.in_(chosen)).values(lease_token=token, lease_until=until))
    newest = and_(JobAttempt.job_id == Job.id, JobAttempt.attempt == Job.attempt)
    query = select(Job, JobAttempt).outerjoin(JobAttempt, newest).where(Job.lease_token == token)
    rows = await session.execute(query.order_by(Job.created_at, Job.id))
    return [Owned(job, attempt, token) for job, attempt in rows]


async def count_on_cluster(session: AsyncSession) -> int:
    query = select(func.count()).select_from(Job).where(Job.state.in_([s.value for s in ON_CLUSTER]))
    return (await session.scalar(query)) or 0


async def _claimable(
    session: AsyncSession, states: frozenset[State] | set[State], limit: int, *where: ColumnElement[bool]
) -> list[str]:
    free = or_(Job.lease_until.is_(None), Job.lease_until < DatabaseTime())
    query = select(Job.id).where(Job.state.in_([s.value for s in states]), free, *where)
    query = query.order_by(Job.created_at, Job.id).limit(limit).with_for_update(skip_locked=True)
    return list(await session.scalars(query))


async def hold(session: AsyncSession, job_id: str, token: str, lease_s: float) -> bool:
    """Renew the lease on one job and lock its row. False: it is somebody else's, and no row was changed."""
    mine = update(Job).where(Job.id == job_id, Job.lease_token == token)
    return await _changed(session, mine.values(lease_until=DatabaseTime(lease_s))) == 1


async def release(session: AsyncSession, token: str) -> int:
    """Give back all that `token` holds; returns how many jobs that were."""
    mine = update(Job).where(Job.lease_token == token)
    return await _changed(session, mine.values(lease_token=None, lease_until=None))


@asynccontextmanager
async def guarded(database: Database, owned: Owned, lease_s: float) -> AsyncIterator[tuple[AsyncSession, Job]]:
    """A transaction that begins by making sure that the job is still ours; gives the row as it is now.

    Raises:
        StaleLease: it is not. Nothing was written.
    """
    async with database.begin() as session:
        if not await hold(session, owned.job.id, owned.token, lease_s):
            raise StaleLease(owned.job.id)
        job = await session.get(Job, owned.job.id, populate_existing=True)
        assert job is not None
        yield session, job


@asynccontextmanager
async def renewing(database: Database, token: str, lease_s: float) -> AsyncIterator[None]:
    """Keep the leases of `token` alive while the block runs."""
    task = asyncio.create_task(_renew(database, token, lease_s))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _renew(database: Database, token: str, lease_s: float) -> None:
    while True:
        await asyncio.sleep(lease_s / 3)
        try:
            async with database.begin() as session:
                mine = update(Job).where(Job.lease_token == token)
                await _changed(session, mine.values(lease_until=DatabaseTime(lease_s)))
        except Exception:
            # The next try may succeed; if none does, the lease runs out and the guard stops us.
            logger.warning("the leases could not be renewed", exc_info=True)


async def _changed(session: AsyncSession, statement: object) -> int:
    result = await session.execute(
        statement,  # type: ignore[call-overload]
        execution_options={"synchronize_session": False},
    )
    assert isinstance(result, CursorResult)
    return result.rowcount
