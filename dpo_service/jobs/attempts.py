"""Gives an attempt to the cluster: its document to storage, its row to the database, and then the submission.

The submission id is a function of the job and the attempt's number and is committed before the cluster is asked, so a
process that dies in between is followed by one that asks for the same again, and the cluster starts it once.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service import ids
from dpo_service.errors import ClusterError
from dpo_service.jobs import moves
from dpo_service.jobs.context import Context, Point
from dpo_service.jobs.lease import Owned, count_on_cluster
from dpo_service.jobs.repository import hash_token
from dpo_service.jobs.states import Move, State
from dpo_service.jobs.tables import JobAttempt
from dpo_service.specs.run import AttemptSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store

_PG_SUBMIT_LOCK = 0x64706F73  # "dpos"


async def begin(context: Context, owned: Owned) -> None:
    """Start the next attempt of a queued job, if there is a place for it."""
    number = owned.job.attempt + 1
    token = secrets.token_urlsafe(32)
    submission_id = ids.submission_id(owned.job.id, number)
    url = f"{context.base_url}/internal/attempts/{submission_id}/reports" if context.base_url else None
    document = AttemptSpec(run=owned.job.run_spec, attempt=number, report_url=url, report_token=token)
    await asyncio.to_thread(_write_private, context.store, document)
    context.reached(Point.SPEC_WRITTEN)
    if await _commit(context, owned, number, token):
        context.reached(Point.ATTEMPT_COMMITTED)
        await hand_over(context, owned, number)


def _write_private(store: Store, document: AttemptSpec) -> None:
    """Readable by the owner alone: it holds the token."""
    with store.replacing(paths.attempt_spec(document.run.job_id, document.attempt)) as path:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(document.model_dump_json(indent=1))


async def _commit(context: Context, owned: Owned, number: int, token: str) -> bool:
    """The attempt's row and the move, if the job is still queued and fewer jobs than allowed are on the cluster."""
    now = context.clock.now()
    async with context.guarded(owned) as (session, job):
        await _one_at_a_time(session)
        full = await count_on_cluster(session) >= context.settings.max_running_jobs
        if job.job_state is not State.QUEUED or full:
            return False
        moves.apply(session, job, Move.SUBMIT, actor="reconciler", reason=_announcement(number), now=now)
        job.attempt = number
        job.not_before = None
        job.progress = None
        attempt = JobAttempt(
            submission_id=ids.submission_id(job.id, number),
            job_id=job.id,
            attempt=number,
            token_hash=hash_token(token),
            created_at=now,
        )
        session.add(attempt)
    return True


def _announcement(number: int) -> str:
    return "The job is given to the cluster" if number == 1 else f"Attempt {number} is given to the cluster"


async def _one_at_a_time(session: AsyncSession) -> None:
    """Two replicas must not both take the last place. On SQLite a transaction is alone anyway."""
    if session.get_bind().dialect.name == "postgresql":
        await session.execute(text(f"SELECT pg_advisory_xact_lock({_PG_SUBMIT_LOCK})"))


async def hand_over(context: Context, owned: Owned, number: int) -> None:
    """Ask the cluster for the attempt (again, where it is not certain that it was asked), and note that it accepted."""
    job_id = owned.job.id
    # A Ray of our own runs our interpreter, on PATH or not; another one has its own.
    python = sys.executable if context.settings.cluster == "local" else "python"
    entrypoint = [python, "-m", "dpo_service.runner", str(context.store.root), job_id, str(number)]
    environment = {"PYTHONUNBUFFERED": "1"}
    if not context.settings.hub:
        environment["HF_HUB_OFFLINE"] = "1"
    metadata = {"job_id": job_id, "attempt": str(number)}
    try:
        await context.cluster.submit(ids.submission_id(job_id, number), entrypoint, environment, metadata)
    except ClusterError as error:
        # Asked again at the next tick, for as long as it takes: not to be reached is not to have failed.
        await _note_refusal(context, owned, number, error)
        return
    context.reached(Point.SUBMITTED)
    async with context.guarded(owned) as (session, _):
        attempt = await session.get_one(JobAttempt, ids.submission_id(job_id, number))
        attempt.submitted_at = context.clock.now()
    context.reached(Point.SUBMISSION_NOTED)


async def _note_refusal(context: Context, owned: Owned, number: int, error: ClusterError) -> None:
    """Tell the user, once an attempt, why nothing happens."""
    message = f"The cluster does not take the job yet; it will be asked again: {error.message}"
    async with context.guarded(owned) as (session, job):
        await moves.note(session, job, f"submission-refused:{number}", message, now=context.clock.now(), level="warn")
