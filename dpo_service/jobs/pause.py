"""The user's wishes to pause a job and to resume it.

A queued job is paused here and now; one on the cluster is asked to save and stop by the reconciler, as for a cancel,
and is paused when its attempt is gone. A paused job holds neither workers nor a place among the running. Resumed, it is
queued, and its next attempt goes on from the newest checkpoint that verifies, which is the one saved at the pause.
"""

from __future__ import annotations

from dpo_service.clock import Clock, SystemClock
from dpo_service.db.session import Database
from dpo_service.errors import Conflict
from dpo_service.jobs import moves
from dpo_service.jobs.states import ON_CLUSTER, Move, State
from dpo_service.jobs.tables import Job
from dpo_service.jobs.wishes import unended


async def pause(database: Database, job_id: str, *, clock: Clock | None = None) -> Job:
    """Record the wish, and return the job as it is now. Asking twice is asking once.

    Raises:
        NotFound: no such job.
        Conflict: it has ended, or is being cancelled.
    """
    now = (clock or SystemClock()).now()
    async with unended(database, job_id, "paused") as (session, job):
        if job.job_state is State.CANCELLING:
            raise Conflict(f"job {job_id!r} is being cancelled; it cannot be paused any more")
        reason = "The user asked to pause" if job.job_state in ON_CLUSTER else "Paused by the user"
        moves.apply(session, job, Move.PAUSE, actor="user", reason=reason, now=now)
        if job.pause_requested_at is None:
            job.pause_requested_at = now
        return job


async def resume(database: Database, job_id: str, *, clock: Clock | None = None) -> Job:
    """Put a paused job back into the queue, to start when there is a place. One that is not paused goes on anyway.

    Raises:
        NotFound: no such job.
        Conflict: it has ended, is being cancelled, or has not finished pausing.
    """
    now = (clock or SystemClock()).now()
    async with unended(database, job_id, "resumed") as (session, job):
        if job.job_state is State.PAUSING:
            raise Conflict(
                f"job {job_id!r} is still pausing: it saves and gives back its workers; resume it when its `state` is "
                "`paused`"
            )
        if job.job_state is State.CANCELLING:
            raise Conflict(f"job {job_id!r} is being cancelled; it cannot be resumed any more")
        if job.job_state is State.PAUSED:
            job.not_before = job.pause_requested_at = None
        moves.apply(session, job, Move.RESUME, actor="user", reason="Resumed by the user", now=now)
        return job
