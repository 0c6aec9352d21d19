"""/v1/files: what users train on. A file is read whole when it is uploaded, and refused with the line that is wrong."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse

from dpo_service import ids
from dpo_service.api import usage
from dpo_service.api.deps import Services, ServicesDep
from dpo_service.api.multipart import receive_file
from dpo_service.api.problems import docs
from dpo_service.api.schemas.common import After, Deleted
from dpo_service.api.schemas.files import FileList, FileObject
from dpo_service.api.uploads import Incoming, arriving, expires_after, keep, require_purpose, sweep_expired
from dpo_service.errors import Conflict, NotFound
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.registry import files, models
from dpo_service.registry.paging import Order
from dpo_service.registry.tables import File
from dpo_service.rows.check import check_file
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.data import Truncation
from dpo_service.storage import paths

router = APIRouter(prefix="/v1/files", tags=["files"])
DEFAULT_MAX_LENGTH = 1024
UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}


@router.post("", responses=docs(413), openapi_extra=UPLOAD_BODY)
async def create_file(request: Request, services: ServicesDep) -> FileObject:
    """Upload a training file: preference pairs, or prompts with an answer each; JSON, JSONL, Parquet, or gzip."""
    await sweep_expired(services)
    file_id = ids.new_file_id()
    async with arriving(services, file_id) as place:
        limit = services.settings.max_upload_bytes
        received = await receive_file(request, place, store=services.store, limit=limit)
        incoming = Incoming(
            name=files.safe_name(received.filename),
            bytes=received.bytes,
            sha256=received.sha256,
            purpose=require_purpose(received.fields.get("purpose")),
            expires_after_s=expires_after(received.fields),
        )
        return FileObject.of(await keep(services, file_id, place, incoming))


@router.get("", responses=docs())
async def list_files(
    services: ServicesDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> FileList:
    async with services.database.begin() as session:
        rows, has_more = await files.list_files(
            session, now=services.clock.now(), after=after, limit=limit, order=order, purpose=purpose
        )
    data = [FileObject.of(row) for row in rows]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return FileList(data=data, has_more=has_more, first_id=first, last_id=last)


@router.get("/{file_id}", responses=docs(404))
async def retrieve_file(file_id: str, services: ServicesDep) -> FileObject:
    return FileObject.of(await _file(services, file_id))


@router.delete("/{file_id}", responses=docs(404, 409))
async def delete_file(file_id: str, services: ServicesDep) -> Deleted:
    """Refused while a job that has not ended uses the file."""
    async with services.database.begin() as session:
        row = await files.get(session, file_id, now=services.clock.now())
        users = await usage.jobs_using_file(session, file_id)
        if users:
            raise Conflict(f"file {file_id!r} is used by {', '.join(users)}; cancel that job, or let it end")
        await files.delete(session, row)
    await asyncio.to_thread(services.store.delete, paths.file_key(file_id, ""))
    return Deleted(id=file_id, object="file")


@router.get("/{file_id}/content", responses=docs(404), response_class=FileResponse)
async def download_file(file_id: str, services: ServicesDep) -> FileResponse:
    row = await _file(services, file_id)
    path = services.store.path(row.key)
    if not path.is_file():
        raise NotFound(f"the bytes of file {file_id!r} are gone from the data directory")
    # An attachment of no particular type: a browser must not take an uploaded file for a page of ours.
    return FileResponse(
        path,
        filename=row.name,
        media_type="application/octet-stream",
        headers={"x-content-type-options": "nosniff"},
    )


@router.get("/{file_id}/report", responses=docs(404))
async def file_report(
    file_id: str,
    services: ServicesDep,
    model: Annotated[str | None, Query(max_length=512, description="Count tokens as this model would")] = None,
    max_length: Annotated[int | None, Query(ge=8, le=1_048_576)] = None,
    truncation: Truncation = "cut",
) -> DatasetReport:
    """What a person wants to know of the file before training on it; with `model`, lengths in its tokens."""
    row = await _file(services, file_id)
    if model is None:
        return DatasetReport.model_validate(row.report)
    return await _report_for_model(services, row, model, max_length, truncation)


async def _report_for_model(
    services: Services, row: File, model: str, max_length: int | None, truncation: Truncation
) -> DatasetReport:
    facts = await models.resolve(model, database=services.database, store=services.store, settings=services.settings)
    longest = max_length or min(facts.max_length, DEFAULT_MAX_LENGTH)
    path = services.store.path(row.key)

    def check() -> DatasetReport:
        tokenizer = Tokenizer.load(facts.directory)
        return check_file(path, row.name, tokenizer=tokenizer, max_length=longest, truncation=truncation, full=True)

    return await asyncio.to_thread(check)


async def _file(services: Services, file_id: str) -> File:
    async with services.database.begin() as session:
        return await files.get(session, file_id, now=services.clock.now())
