"""/v1/fine_tuning/jobs: make a job, watch it, pause and resume it, end it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service import ids
from dpo_service.api import idempotency
from dpo_service.api.deps import Services, ServicesDep
from dpo_service.api.event_stream import MEDIA_TYPE, stream_events
from dpo_service.api.problems import docs
from dpo_service.api.schemas.common import After
from dpo_service.api.schemas.jobs import (
    CheckpointList,
    CheckpointObject,
    EventList,
    EventObject,
    JobDataset,
    JobList,
    JobObject,
)
from dpo_service.api.schemas.plans import PlanObject
from dpo_service.api.schemas.samples import SampleList
from dpo_service.errors import UserError
from dpo_service.jobs import cancel, pause, repository, samples, submit
from dpo_service.jobs.admit import admit
from dpo_service.jobs.plan import plan_job
from dpo_service.jobs.tables import Job
from dpo_service.planning.gpus import DEVICES
from dpo_service.registry import files, models
from dpo_service.specs.job import JobSpec

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
Limit = Annotated[int, Query(ge=1, le=100)]
METADATA_DOCS: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "description": "`metadata[key]=value`, any number of them: jobs that carry all of these",
            "style": "deepObject",
            "explode": True,
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}
EVENTS_DOCS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": EventList,
        "description": "A page, newest first; with stream=true the events as they come",
        "content": {MEDIA_TYPE: {}},
    }
}
TEXT_DOCS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.post("", responses=docs(404, 409, 413, 502, 503), response_model=JobObject)
async def create_job(
    spec: JobSpec,
    request: Request,
    services: ServicesDep,
    idempotency_key: Annotated[str | None, Header(description="Sent again with the same key, it is done once")] = None,
) -> Response:
    """Check everything that can be checked now (model, every row, capacity), then queue the job."""
    once = await idempotency.Once.of(request)
    async with idempotency.one_at_a_time(services, once):
        answer = await idempotency.answer(services, once)
        if answer is None:
            answer = await _create(services, once, spec)
    services.on_change()
    return JSONResponse(answer)


async def _create(services: Services, once: idempotency.Once, spec: JobSpec) -> dict[str, Any]:
    run, report = await admit(
        spec,
        database=services.database,
        store=services.store,
        cluster=services.cluster,
        settings=services.settings,
        clock=services.clock,
    )

    async def insert(session: AsyncSession) -> tuple[str, dict[str, Any]]:
        # Again, now that nobody can delete them: checking the rows took a while.
        for file_id in filter(None, (spec.training_file, spec.validation_file, spec.mix.file if spec.mix else None)):
            await files.get(session, file_id)
        if run.model.key is not None:
            await models.get(session, spec.model)
        job = await submit.insert(session, run, spec, report, clock=services.clock)
        return job.id, JobObject.of(job).model_dump(mode="json")

    return await idempotency.make(services, once, insert)


@router.post("/plan", responses=docs(404, 413, 502, 503))
async def plan(
    spec: JobSpec,
    services: ServicesDep,
    gpu: Annotated[str | None, Query(max_length=64, description=f"One of {', '.join(DEVICES)}")] = None,
    gpus: Annotated[int | None, Query(ge=1, le=1024, description="How many, in the place of the job's workers")] = None,
) -> PlanObject:
    """Check a job as if it were created, make nothing, and say what it would need and take on a device that need not
    be there. Without `gpu`: an H100 where the job asks for GPUs, else this machine's CPUs."""
    planned = await plan_job(
        spec,
        gpu=gpu,
        gpus=gpus,
        database=services.database,
        store=services.store,
        settings=services.settings,
        clock=services.clock,
    )
    return PlanObject.of(planned)


@router.get("", responses=docs(), openapi_extra=METADATA_DOCS)
async def list_jobs(request: Request, services: ServicesDep, after: After = None, limit: Limit = 20) -> JobList:
    """Newest first."""
    metadata = _metadata(request)
    async with services.database.begin() as session:
        jobs, has_more = await repository.list_jobs(session, after=after, limit=limit, metadata=metadata)
    return JobList(data=[JobObject.of(job) for job in jobs], has_more=has_more)


def _metadata(request: Request) -> dict[str, str]:
    """The `metadata[key]=value` of the query."""
    found = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.multi_items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    if len(found) > 16 or any(not 0 < len(key) <= 64 or '"' in key or "\\" in key for key in found):
        raise UserError(
            "metadata[key]: at most 16 keys of 1 to 64 characters, without quotes and backslashes", param="metadata"
        )
    return found


@router.get("/{job_id}", responses=docs(404))
async def retrieve_job(job_id: str, services: ServicesDep) -> JobObject:
    return JobObject.of(await _job(services, job_id))


@router.post("/{job_id}/cancel", responses=docs(404, 409))
async def cancel_job(job_id: str, services: ServicesDep) -> JobObject:
    """A queued job ends at once; a running one saves and ends at its next step. 409 when it has ended."""
    job = await cancel.cancel(services.database, job_id, clock=services.clock)
    services.on_change()
    return JobObject.of(job)


@router.post("/{job_id}/pause", responses=docs(404, 409))
async def pause_job(job_id: str, services: ServicesDep) -> JobObject:
    """A running job saves at its next step and gives back its workers; it is paused when `state` says so (`status` is
    then `queued`, as OpenAI's list of words has no other). 409 when it has ended or is being cancelled."""
    job = await pause.pause(services.database, job_id, clock=services.clock)
    services.on_change()
    return JobObject.of(job)


@router.post("/{job_id}/resume", responses=docs(404, 409))
async def resume_job(job_id: str, services: ServicesDep) -> JobObject:
    """Queue a paused job again: it goes on from the step it was paused at. 409 when it has ended, is being cancelled or
    is still pausing; nothing happens to one that is not paused."""
    job = await pause.resume(services.database, job_id, clock=services.clock)
    services.on_change()
    return JobObject.of(job)


@router.get("/{job_id}/events", responses=docs(404) | EVENTS_DOCS, response_model=EventList)
async def list_events(
    job_id: str,
    request: Request,
    services: ServicesDep,
    after: After = None,
    limit: Limit = 20,
    stream: Annotated[bool, Query(description="Server-sent events, oldest first, until the job has ended")] = False,
    last_event_id: Annotated[str | None, Header(description="Go on after this `sequence` (stream)")] = None,
) -> Any:
    """Newest first, `after` an event's id. A stream goes the other way, `after` an event's `sequence`."""
    if stream:
        start = _sequence(last_event_id or after)
        await _job(services, job_id)
        return StreamingResponse(stream_events(services, job_id, start), media_type=MEDIA_TYPE, headers=NO_BUFFER)
    async with services.database.begin() as session:
        events, has_more = await repository.list_events(session, job_id, after=after, limit=limit)
    return EventList(data=[EventObject.of(event) for event in events], has_more=has_more)


NO_BUFFER = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def _sequence(text: str | None) -> int:
    if text is None:
        return 0
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise UserError(
            "after (or Last-Event-ID) must be the `sequence` of an event, a number, in a stream", param="after"
        )
    return int(text)


@router.get("/{job_id}/checkpoints", responses=docs(404))
async def list_checkpoints(
    job_id: str, services: ServicesDep, after: After = None, limit: Limit = 10
) -> CheckpointList:
    """Newest first."""
    async with services.database.begin() as session:
        rows, has_more = await repository.list_checkpoints(session, job_id, after=after, limit=limit)
    data = [CheckpointObject.of(row) for row in rows]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return CheckpointList(data=data, has_more=has_more, first_id=first, last_id=last)


@router.get("/{job_id}/dataset", responses=docs(404))
async def job_dataset(job_id: str, services: ServicesDep) -> JobDataset:
    """The report on the job's file in the model's tokens, and what the data stage made of it."""
    return JobDataset.of(await _job(services, job_id))


@router.get("/{job_id}/samples", responses=docs(404))
async def list_samples(
    job_id: str,
    services: ServicesDep,
    step: Annotated[int | None, Query(ge=1, lt=10**8, description="Only those made for this step, from 1")] = None,
    after: After = None,
    limit: Limit = 20,
) -> SampleList:
    """Prompts with the answers that were sampled to them, scores, verdicts and pairs; the newest steps first. Empty for
    a job that trains on a file."""
    await _job(services, job_id)
    return SampleList.of(
        await asyncio.to_thread(samples.read, services.store, job_id, step=step, after=after, limit=limit)
    )


@router.get("/{job_id}/logs", responses=docs(404, 502) | TEXT_DOCS, response_class=PlainTextResponse)
async def job_logs(job_id: str, services: ServicesDep) -> str:
    """What the newest attempt has printed; empty before the first."""
    job = await _job(services, job_id)
    return await services.cluster.logs(ids.submission_id(job_id, job.attempt)) if job.attempt else ""


async def _job(services: Services, job_id: str) -> Job:
    async with services.database.begin() as session:
        return await repository.get_job(session, job_id)
