"""The user's wish to end a job. A queued one ends here and now; one on the cluster is asked to by the reconciler."""

from __future__ import annotations

from dpo_service.clock import Clock, SystemClock
from dpo_service.db.session import Database
from dpo_service.errors import Conflict, NotFound
from dpo_service.jobs import moves
from dpo_service.jobs.states import TERMINAL, Move, State
from dpo_service.jobs.tables import Job


async def cancel(database: Database, job_id: str, *, clock: Clock | None = None) -> Job:
    """Record the wish, and return the job as it is now. Asking twice is asking once.

    Raises:
        NotFound: no such job.
        Conflict: it has ended.
    """
    now = (clock or SystemClock()).now()
    async with database.begin() as session:
        job = await session.get(Job, job_id, with_for_update=True)
        if job is None:
            raise NotFound(f"there is no fine-tuning job {job_id!r}; see GET /v1/fine_tuning/jobs")
        if job.job_state in TERMINAL:
            raise Conflict(
                f"job {job_id!r} has {_ended(job.job_state)}; only a job that has not ended can be cancelled"
            )
        reason = "Cancelled by the user" if job.job_state is State.QUEUED else "The user asked to cancel"
        moves.apply(session, job, Move.CANCEL, actor="user", reason=reason, now=now)
        if job.cancel_requested_at is None:
            job.cancel_requested_at = now
        return job


def _ended(state: State) -> str:
    return "been cancelled already" if state is State.CANCELLED else f"{state} already"
