"""Ends an attempt that is gone: reads what it said and how it ended, and moves its job, all in the job's favour.

A crash in the middle is harmless: reports count once by their key, and the move, the published model and what follows
from it (a deployment) are one transaction.
"""

from __future__ import annotations

import asyncio
import logging

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.errors import DpoServiceError, UserError
from dpo_service.jobs import ingest, moves
from dpo_service.jobs.context import Context, Point
from dpo_service.jobs.lease import Owned
from dpo_service.jobs.outcome import Ending, Success, Verdict, judge, read_result
from dpo_service.jobs.states import Move
from dpo_service.jobs.tables import Job, JobAttempt
from dpo_service.registry import models
from dpo_service.reports import Report, read_spool, spool_files
from dpo_service.storage import paths
from dpo_service.storage.store import Store

logger = logging.getLogger(__name__)
MODEL = "model"


async def conclude(context: Context, owned: Owned, attempt: JobAttempt, message: str) -> None:
    """`message` is what the cluster says of the attempt's end."""
    await _ingest_spool(context, owned, attempt)
    ending = await asyncio.to_thread(read_result, context.store, attempt.job_id, attempt.attempt, message)
    context.reached(Point.RESULT_READ)
    async with context.guarded(owned) as (session, job):
        verdict = judge(
            ending,
            job.job_state,
            attempt=attempt.attempt,
            failures=job.failures,
            max_attempts=context.settings.max_attempts,
            chance=context.random.random(),
        )
        await _apply(context, session, job, ending, verdict)
        row = await session.get_one(JobAttempt, attempt.submission_id)
        row.gone_at, row.outcome = context.clock.now(), verdict.message
    context.reached(Point.CONCLUDED)


async def _apply(context: Context, session: AsyncSession, job: Job, ending: Ending, verdict: Verdict) -> None:
    now = context.clock.now()
    if isinstance(ending, Success):
        await _publish(context, session, job, ending)
    if verdict.move is Move.FAIL and verdict.failure is not None:
        job.error_code = verdict.failure.code
        job.error_message = verdict.failure.message
        job.error_param = verdict.failure.param
    if verdict.delay is not None:
        job.not_before = now + verdict.delay
        job.failures += 1
        job.progress = None
    moves.apply(session, job, verdict.move, actor="reconciler", reason=verdict.message, now=now, level=verdict.level)
    if verdict.move is Move.SUCCEED and job.deploy and context.on_published is not None:
        await _follow_up(context, session, job)


async def _publish(context: Context, session: AsyncSession, job: Job, success: Success) -> None:
    run = job.run_spec
    await models.publish(
        session,
        run.output_model,
        job_id=job.id,
        key=f"{success.checkpoint}/{MODEL}",
        digest=success.manifest.digest,
        base=run.model.name,
        created_at=context.clock.now(),
    )
    job.fine_tuned_model = run.output_model
    job.trained_tokens = success.result.trained_tokens
    message = f"New fine-tuned model created: {run.output_model}"
    await moves.note(session, job, "published", message, now=context.clock.now())


async def _follow_up(context: Context, session: AsyncSession, job: Job) -> None:
    """The deployment the user asked for. That it cannot be had does not undo the training."""
    assert context.on_published is not None
    try:
        async with session.begin_nested():
            await context.on_published(session, job)
    except DpoServiceError as error:
        await session.refresh(job)
        message = f"The model is published, but could not be deployed: {error.message}"
        await moves.note(session, job, "not-deployed", message, now=context.clock.now(), level="warn")


async def _ingest_spool(context: Context, owned: Owned, attempt: JobAttempt) -> None:
    """What the attempt wrote down; most of it has come over HTTP before."""
    batches, damage = await asyncio.to_thread(_read_spool, context.store, attempt.job_id, attempt.attempt)
    for batch in batches:
        async with context.guarded(owned) as (session, job):
            await ingest.record(session, job, [report for report in batch if _makes_sense(job, report)])
        context.reached(Point.BATCH_INGESTED)
    if damage:
        async with context.guarded(owned) as (session, job):
            key = f"spool-damaged:{attempt.attempt}"
            await moves.note(session, job, key, damage, now=context.clock.now(), level="warn")


def _makes_sense(job: Job, report: Report) -> bool:
    """One that does not is left out; it must not keep the job from ending."""
    try:
        ingest.check(job, report)
    except UserError as error:
        logger.warning("job %s: %s", job.id, error.message)
        return False
    return True


def _read_spool(store: Store, job_id: str, attempt: int) -> tuple[list[list[Report]], str]:
    """All batches, and a sentence on what could not be read ("" = all could)."""
    batches: list[list[Report]] = []
    damage = []
    for path in spool_files(store.path(paths.spool_dir(job_id, attempt))):
        try:
            batches += [batch for batch, _ in read_spool(path)]
        except (ValueError, OSError) as error:
            damage.append(f"{path.name} ({type(error).__name__})")
    said = f"Part of what the job said could not be read: {', '.join(damage)}" if damage else ""
    return batches, said
