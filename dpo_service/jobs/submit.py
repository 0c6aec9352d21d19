"""Makes an admitted job durable."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.clock import Clock, SystemClock
from dpo_service.db.session import Database
from dpo_service.jobs import moves
from dpo_service.jobs.states import State
from dpo_service.jobs.tables import Job
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.specs.job import JobSpec
from dpo_service.specs.run import RunSpec


async def create(
    database: Database, run: RunSpec, spec: JobSpec, report: DatasetReport, *, clock: Clock | None = None
) -> Job:
    """Store the job, queued, in one transaction. When this returns, no crash can lose it."""
    async with database.begin() as session:
        return await insert(session, run, spec, report, clock=clock)


async def insert(
    session: AsyncSession, run: RunSpec, spec: JobSpec, report: DatasetReport, *, clock: Clock | None = None
) -> Job:
    """`create` within the caller's transaction, for a caller with something of its own to commit beside it."""
    job = Job(
        id=run.job_id,
        created_at=(clock or SystemClock()).now(),
        state=State.QUEUED.value,
        attempt=0,
        failures=0,
        spec=spec.model_dump(mode="json"),
        run=run.model_dump(mode="json"),
        meta=dict(spec.metadata) if spec.metadata else None,
        deploy=spec.deploy,
        report=report.model_dump(mode="json"),
    )
    session.add(job)
    await session.flush()
    moves.record_creation(session, job)
    await session.flush()
    return job
