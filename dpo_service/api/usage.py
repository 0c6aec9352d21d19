"""Who still uses a file or a model: what must be asked before it is deleted, in the same transaction."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.deployments.tables import LIVE, Deployment
from dpo_service.jobs.states import TERMINAL
from dpo_service.jobs.tables import Job


async def jobs_using_file(session: AsyncSession, file_id: str) -> list[str]:
    """Ids of the jobs that have not ended and train or validate on the file."""
    return [
        job.id
        for job in await _live_jobs(session)
        if file_id in (job.spec["training_file"], job.spec.get("validation_file"))
    ]


async def jobs_using_model(session: AsyncSession, model_id: str) -> list[str]:
    """Ids of the jobs that have not ended and train from the model."""
    return [job.id for job in await _live_jobs(session) if job.spec["model"] == model_id]


async def deployments(session: AsyncSession) -> dict[str, str]:
    """The state of the deployment of every model that has one, by the model's name."""
    rows = await session.execute(select(Deployment.model, Deployment.state).where(Deployment.state.in_(LIVE)))
    return {model: str(state) for model, state in rows}


async def _live_jobs(session: AsyncSession) -> Sequence[Job]:
    return list(await session.scalars(select(Job).where(Job.state.not_in([s.value for s in TERMINAL]))))
