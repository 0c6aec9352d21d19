"""Reads of jobs and what belongs to them. Functions take a session first and never commit."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Select, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.errors import NotFound, Unauthorized, UserError
from dpo_service.jobs.ingest import ingest
from dpo_service.jobs.states import State
from dpo_service.jobs.tables import Job, JobAttempt, JobCheckpoint, JobEvent

__all__ = [
    "authenticate",
    "count_by_state",
    "events_since",
    "get_attempt",
    "get_job",
    "ingest",
    "list_checkpoints",
    "list_events",
    "list_jobs",
]


async def get_job(session: AsyncSession, job_id: str, *, lock: bool = False) -> Job:
    """`lock`: keep the row from changing until the transaction ends. Raises NotFound."""
    job = await session.get(Job, job_id, with_for_update=True if lock else None)
    if job is None:
        raise NotFound(f"there is no fine-tuning job {job_id!r}; see `dpo jobs`, or GET /v1/fine_tuning/jobs")
    return job


async def list_jobs(
    session: AsyncSession, *, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None
) -> tuple[Sequence[Job], bool]:
    """A page of jobs, newest first, and whether more follow. `after` is the id of the last job seen.

    Raises:
        UserError: `after` names no job.
    """
    query = select(Job).order_by(Job.created_at.desc(), Job.id.desc())
    for key, value in (metadata or {}).items():
        query = query.where(Job.meta[key].as_string() == value)
    if after is not None:
        last = await session.get(Job, after)
        if last is None:
            raise _no_cursor(after)
        query = query.where(tuple_(Job.created_at, Job.id) < (last.created_at, last.id))
    return await _page(session, query, limit)


async def list_events(
    session: AsyncSession, job_id: str, *, after: str | None = None, limit: int = 20
) -> tuple[Sequence[JobEvent], bool]:
    """A page of the job's events, newest first, and whether more follow. `after` is the id of the last event seen.

    Raises:
        NotFound: no such job.
        UserError: `after` names none of its events.
    """
    await get_job(session, job_id)
    query = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence.desc())
    if after is not None:
        mine = select(JobEvent.sequence).where(JobEvent.job_id == job_id, JobEvent.id == after)
        sequence = await session.scalar(mine)
        if sequence is None:
            raise _no_cursor(after)
        query = query.where(JobEvent.sequence < sequence)
    return await _page(session, query, limit)


async def events_since(session: AsyncSession, job_id: str, sequence: int, limit: int = 500) -> Sequence[JobEvent]:
    """The job's events after `sequence` (0 = all), oldest first: what a live stream sends next."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.sequence > sequence)
    return list(await session.scalars(query.order_by(JobEvent.sequence).limit(limit)))


async def list_checkpoints(
    session: AsyncSession, job_id: str, *, after: str | None = None, limit: int = 10
) -> tuple[Sequence[JobCheckpoint], bool]:
    """A page of the job's checkpoints, newest first, and whether more follow.

    Raises:
        NotFound: no such job.
        UserError: `after` names none of its checkpoints.
    """
    await get_job(session, job_id)
    query = select(JobCheckpoint).where(JobCheckpoint.job_id == job_id).order_by(JobCheckpoint.step.desc())
    if after is not None:
        last = await session.get(JobCheckpoint, after)
        if last is None or last.job_id != job_id:
            raise _no_cursor(after)
        query = query.where(JobCheckpoint.step < last.step)
    return await _page(session, query, limit)


async def get_attempt(session: AsyncSession, job_id: str, attempt: int) -> JobAttempt:
    """Raises NotFound."""
    query = select(JobAttempt).where(JobAttempt.job_id == job_id, JobAttempt.attempt == attempt)
    row = await session.scalar(query)
    if row is None:
        raise NotFound(f"job {job_id!r} has no attempt {attempt}")
    return row


async def authenticate(session: AsyncSession, submission_id: str, token: str) -> JobAttempt:
    """The attempt that `token` admits reports of.

    Raises:
        Unauthorized: the token is not that attempt's, or there is no such attempt; the caller learns not which.
    """
    row = await session.get(JobAttempt, submission_id)
    expected = row.token_hash if row is not None else ""
    if row is None or not hmac.compare_digest(expected, hash_token(token)):
        raise Unauthorized("the token does not admit reports of this attempt")
    return row


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


async def count_by_state(session: AsyncSession) -> dict[State, int]:
    """How many jobs are in each state, zeros included."""
    rows = await session.execute(select(Job.state, func.count()).group_by(Job.state))
    counted = {State(state): count for state, count in rows}
    return {state: counted.get(state, 0) for state in State}


async def _page(session: AsyncSession, query: Select[Any], limit: int) -> tuple[list[Any], bool]:
    rows = list(await session.scalars(query.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def _no_cursor(after: str) -> UserError:
    return UserError(f"after: there is no {after!r} here; give the id of the last entry you have", param="after")
