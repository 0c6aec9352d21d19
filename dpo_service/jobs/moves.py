"""Moves a job: the state, the times that go with it, and one event that says who did it and why."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service import ids
from dpo_service.jobs.states import TERMINAL, Move, State, after
from dpo_service.jobs.tables import Job, JobEvent

Actor = Literal["user", "reconciler"]
Level = Literal["info", "warn", "error"]


def record_creation(session: AsyncSession, job: Job) -> None:
    """The first event of a job: from nothing to queued."""
    _record(session, job, None, State.QUEUED, "user", f"Created fine-tuning job: {job.id}", "info", job.created_at)


def apply(
    session: AsyncSession, job: Job, move: Move, *, actor: Actor, reason: str, now: datetime, level: Level = "info"
) -> State:
    """Make `move`, from the state the row is in now. The caller holds the row's lock.

    A move that leads to the state the job is in already writes nothing.

    Raises:
        Conflict: the table refuses the move.
    """
    before = job.job_state
    target = after(before, move)
    if target is before:
        return target
    job.state = target.value
    if job.started_at is None and (target is State.RUNNING or move is Move.SUCCEED):
        job.started_at = now
    if target in TERMINAL:
        job.finished_at = now
    job.paused_at = now if target is State.PAUSED else None
    _record(session, job, before, target, actor, reason, level, now)
    return target


async def note(
    session: AsyncSession, job: Job, key: str, message: str, *, now: datetime, level: Level = "info"
) -> None:
    """Tell the user something, once for each `key` of the job. The caller holds the row's lock."""
    known = select(JobEvent.sequence).where(JobEvent.job_id == job.id, JobEvent.key == key)
    if await session.scalar(known) is None:
        event_id = ids.new_event_id()
        session.add(_message(job, event_id, key, message, level, now))


def _record(
    session: AsyncSession,
    job: Job,
    before: State | None,
    target: State,
    actor: Actor,
    reason: str,
    level: Level,
    now: datetime,
) -> None:
    event_id = ids.new_event_id()
    event = _message(job, event_id, f"move:{event_id}", reason, level, now)
    event.actor, event.from_state, event.to_state = actor, before and before.value, target.value
    session.add(event)


def _message(job: Job, event_id: str, key: str, message: str, level: Level, now: datetime) -> JobEvent:
    return JobEvent(
        id=event_id, job_id=job.id, key=key, created_at=now, level=level, type="message", message=message, data=None
    )
