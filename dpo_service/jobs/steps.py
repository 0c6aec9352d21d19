"""What the reconciler does for one job: look at where it stands, do the next thing, note it. Slow work lies between the
transactions; each transaction begins with the guard of the lease; each step may be repeated after a crash.

    queued ── write attempt.json ── [attempt row, SUBMIT] ── cluster.submit ── [note it]              attempts.py
    on the cluster ── observe ─┬─ UNKNOWN: nothing
                               ├─ ALIVE:   [START]; when stopping: stop flag, after the grace cluster.stop
                               └─ GONE:    spool ── [ingest] ── result.json ── [publish, move]        conclude.py

[...] is a transaction. Between any two of these the process may die; `context.Point` names the places.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

from dpo_service.cluster.port import JobObservation, Liveness
from dpo_service.jobs import attempts, moves
from dpo_service.jobs.conclude import conclude
from dpo_service.jobs.context import Context, Point
from dpo_service.jobs.lease import Owned
from dpo_service.jobs.states import STOPPING, TABLE, Move, State
from dpo_service.jobs.tables import JobAttempt
from dpo_service.storage import paths


async def step(context: Context, owned: Owned) -> None:
    """Take one job as far as it goes without waiting.

    Raises:
        StaleLease: another process owns the job by now.
        ClusterError: the cluster did not do what it was asked; the next tick asks again.
    """
    context.reached(Point.CLAIMED)
    state, attempt = owned.job.job_state, owned.attempt
    if state is State.QUEUED:
        await attempts.begin(context, owned)
        return
    assert attempt is not None, "a job on the cluster has an attempt"
    if state in STOPPING:
        await _ask_to_stop(context, attempt)
    elif attempt.submitted_at is None:
        await attempts.hand_over(context, owned, attempt.attempt)
        return
    await _follow(context, owned, attempt)


async def _ask_to_stop(context: Context, attempt: JobAttempt) -> None:
    flag = paths.stop_flag(attempt.job_id, attempt.attempt)
    if not context.store.exists(flag):
        await asyncio.to_thread(context.store.write, flag, b"")
        context.reached(Point.STOP_FLAG_WRITTEN)


async def _follow(context: Context, owned: Owned, attempt: JobAttempt) -> None:
    seen = await context.cluster.observe(attempt.submission_id)
    context.reached(Point.OBSERVED)
    if seen.liveness is Liveness.UNKNOWN:
        return
    if seen.liveness is Liveness.GONE:
        await conclude(context, owned, attempt, seen.message)
        return
    if seen.running and attempt.running_at is None:
        await _mark_running(context, owned, attempt)
    if owned.job.job_state in STOPPING and _patience_is_over(context, owned, attempt, seen):
        await _force(context, owned, attempt)


async def _mark_running(context: Context, owned: Owned, attempt: JobAttempt) -> None:
    now = context.clock.now()
    async with context.guarded(owned) as (session, job):
        row = await session.get_one(JobAttempt, attempt.submission_id)
        row.running_at = now
        if TABLE[job.job_state][Move.START] is not None:
            reason = "Fine-tuning job started" if attempt.attempt == 1 else f"Attempt {attempt.attempt} started"
            moves.apply(session, job, Move.START, actor="reconciler", reason=reason, now=now)


def _patience_is_over(context: Context, owned: Owned, attempt: JobAttempt, seen: JobObservation) -> bool:
    """One that has not begun has nothing to save; one that has gets the grace, and again before each reminder."""
    last: datetime | None = attempt.stop_sent_at
    if last is None:
        if not seen.running:
            return True
        last = owned.job.stop_requested_at
    assert last is not None
    return context.clock.now() - last >= timedelta(seconds=context.settings.stop_grace_s)


async def _force(context: Context, owned: Owned, attempt: JobAttempt) -> None:
    await context.cluster.stop(attempt.submission_id)
    now = context.clock.now()
    async with context.guarded(owned) as (session, job):
        row = await session.get_one(JobAttempt, attempt.submission_id)
        row.stop_sent_at = now
        await moves.note(session, job, f"stop:{attempt.attempt}", "The cluster was told to end the job", now=now)
