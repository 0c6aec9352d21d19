"""The user's wish to end a job. A queued or paused one ends here and now; one on the cluster is asked to by the
reconciler."""

from __future__ import annotations

from dpo_service.clock import Clock, SystemClock
from dpo_service.db.session import Database
from dpo_service.jobs import moves
from dpo_service.jobs.states import ON_CLUSTER, Move
from dpo_service.jobs.tables import Job
from dpo_service.jobs.wishes import unended


async def cancel(database: Database, job_id: str, *, clock: Clock | None = None) -> Job:
    """Record the wish, and return the job as it is now. Asking twice is asking once.

    Raises:
        NotFound: no such job.
        Conflict: it has ended.
    """
    now = (clock or SystemClock()).now()
    async with unended(database, job_id, "cancelled") as (session, job):
        reason = "The user asked to cancel" if job.job_state in ON_CLUSTER else "Cancelled by the user"
        moves.apply(session, job, Move.CANCEL, actor="user", reason=reason, now=now)
        if job.cancel_requested_at is None:
            job.cancel_requested_at = now
        return job
