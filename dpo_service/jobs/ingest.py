"""Takes what a running job says into the database, every report once however often it comes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, TypeVar

from pydantic import StringConstraints, ValidationError
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service import ids
from dpo_service.errors import Conflict, NotFound, UserError
from dpo_service.jobs import progress
from dpo_service.jobs.tables import Job, JobAttempt, JobCheckpoint, JobEvent
from dpo_service.registry import models
from dpo_service.reports import Report
from dpo_service.specs.base import Spec
from dpo_service.storage import paths

S = TypeVar("S", bound=Spec)


class CheckpointData(Spec):
    """The `data` of a checkpoint report."""

    step: int
    key: str
    digest: str
    metrics: dict[str, float | None]
    pruned: tuple[int, ...] = ()
    """Steps whose checkpoints were deleted to make room."""


class ReferenceData(Spec):
    """The `data` of a reference report."""

    step: int
    digest: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


async def ingest(session: AsyncSession, submission_id: str, reports: Sequence[Report]) -> int:
    """Store the reports of an attempt; returns how many were new. A job that has ended still takes late ones.

    Raises:
        NotFound: no such attempt.
        Conflict: a newer attempt has taken its place; it must stop reporting.
        UserError: a report's data is not what its type says.
    """
    attempt = await session.get(JobAttempt, submission_id)
    if attempt is None:
        raise NotFound(f"there is no attempt {submission_id!r}")
    # Locks the row: events of a job are numbered in the order they are committed.
    job = await session.get(Job, attempt.job_id, with_for_update=True, populate_existing=True)
    assert job is not None
    if attempt.attempt != job.attempt:
        raise Conflict(
            f"attempt {attempt.attempt} of job {job.id} was superseded by attempt {job.attempt}", code="superseded"
        )
    for report in reports:
        check(job, report)
    return await record(session, job, reports)


def check(job: Job, report: Report) -> None:
    """Raises UserError when the report's data is not what its type says."""
    if report.type == "progress":
        _parse(progress.ProgressData, report)
    if report.type == "reference":
        _parse(ReferenceData, report)
    if report.type == "checkpoint":
        data = _parse(CheckpointData, report)
        if data.key != paths.checkpoint_dir(job.id, data.step):
            raise UserError(f"report {report.key!r}: {data.key!r} is not where step {data.step} of {job.id} lies")


async def record(session: AsyncSession, job: Job, reports: Sequence[Report]) -> int:
    """Store checked reports of the job's newest attempt. The caller holds the row's lock. Returns how many were new."""
    said = [report for report in reports if report.type != "progress"]
    for report in reports:
        if report.type == "progress":
            _keep_progress(job, report)
    known = await _known_keys(session, job.id, {report.key for report in said})
    new = 0
    for report in said:
        # Of a step that was saved twice, the later checkpoint is the one that lies there.
        if report.type == "checkpoint":
            await _keep_checkpoint(session, job, report)
        if report.key in known:
            continue
        known.add(report.key)
        new += 1
        if report.type == "dataset":
            job.dataset = report.data
        if report.type == "reference":
            job.reference_digest = _parse(ReferenceData, report).digest
        session.add(_event(job, report))
    await session.flush()
    return new


async def _known_keys(session: AsyncSession, job_id: str, keys: set[str]) -> set[str]:
    query = select(JobEvent.key).where(JobEvent.job_id == job_id, JobEvent.key.in_(keys))
    return set(await session.scalars(query)) if keys else set()


def _event(job: Job, report: Report) -> JobEvent:
    return JobEvent(
        id=ids.new_event_id(),
        job_id=job.id,
        key=report.key,
        created_at=_moment(report.created_at),
        level=report.level,
        type="metrics" if report.type == "metrics" else "message",
        message=report.message,
        data=report.data,
    )


def _keep_progress(job: Job, report: Report) -> None:
    data = _parse(progress.ProgressData, report)
    latest = progress.advance(job.progress, data, attempt=job.attempt, message=report.message, at=report.created_at)
    if latest is not None:
        job.progress = latest.model_dump()


async def _keep_checkpoint(session: AsyncSession, job: Job, report: Report) -> None:
    """Reports read again from a spool come in their order, so what one of them brings back a later one forgets."""
    data, moment = _parse(CheckpointData, report), _moment(report.created_at)
    row = await session.get(JobCheckpoint, ids.checkpoint_id(job.id, data.step))
    if row is None or row.created_at < moment:
        await _store_checkpoint(session, job, data, moment, row)
    for step in data.pruned:
        await _forget_checkpoint(session, job, step)


async def _store_checkpoint(
    session: AsyncSession, job: Job, data: CheckpointData, moment: datetime, row: JobCheckpoint | None
) -> None:
    run = job.run_spec
    if row is None:
        row = JobCheckpoint(id=ids.checkpoint_id(job.id, data.step), job_id=job.id, step=data.step)
        row.model_id = ids.checkpoint_model_id(run.output_model, data.step)
        session.add(row)
    row.key, row.digest, row.metrics, row.created_at = data.key, data.digest, data.metrics, moment
    await models.publish_checkpoint(
        session,
        run.output_model,
        data.step,
        job_id=job.id,
        key=f"{data.key}/model",
        digest=data.digest,
        base=run.model.name,
        created_at=moment,
    )


async def _forget_checkpoint(session: AsyncSession, job: Job, step: int) -> None:
    """What lies there no longer is neither listed nor a model."""
    row = await session.get(JobCheckpoint, ids.checkpoint_id(job.id, step))
    if row is not None:
        await models.delete(session, row.model_id)
        await session.delete(row)


def _parse(model: type[S], report: Report) -> S:
    try:
        return model.model_validate(report.data or {})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"report {report.key!r} ({report.type}): data.{place}: {first['msg']}") from None


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
