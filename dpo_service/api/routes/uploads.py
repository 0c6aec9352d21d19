"""/v1/uploads: a large file in parts. Completed, it is a file like any other, checked row by row."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service import ids
from dpo_service.api.deps import Services, ServicesDep
from dpo_service.api.multipart import receive_file
from dpo_service.api.problems import docs
from dpo_service.api.schemas.files import FileObject
from dpo_service.api.schemas.uploads import CompleteUpload, CreateUpload, PartObject, UploadObject
from dpo_service.api.uploads import Incoming, a_full_disk_is_an_answer, arriving, checked_seconds, keep, require_purpose
from dpo_service.errors import TooLarge, UserError
from dpo_service.registry import files, uploads
from dpo_service.registry.tables import Upload, UploadPart
from dpo_service.storage import paths

router = APIRouter(prefix="/v1/uploads", tags=["files"])
LIFETIME_S = 3600
MAX_PART = 64 << 20
CHUNK = 1 << 20
PART_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("", responses=docs(413))
async def create_upload(body: CreateUpload, services: ServicesDep) -> UploadObject:
    """Announce a file. It must be completed within an hour."""
    if body.bytes > services.settings.max_upload_bytes:
        raise TooLarge(f"the limit is {services.settings.max_upload_bytes:,} bytes a file", param="bytes")
    services.store.require_room(body.bytes)
    await _sweep(services)
    now = services.clock.now()
    row = Upload(
        id=f"upload_{ids.random_suffix()}",
        filename=files.safe_name(body.filename),
        bytes=body.bytes,
        purpose=require_purpose(body.purpose),
        mime_type=body.mime_type,
        created_at=now,
        expires_at=now + timedelta(seconds=LIFETIME_S),
        status="pending",
        file_id=None,
        file_expires_after_s=checked_seconds(body.expires_after.seconds) if body.expires_after else None,
    )
    async with services.database.begin() as session:
        session.add(row)
    return UploadObject.of(row)


@router.post("/{upload_id}/parts", responses=docs(404, 409, 413), openapi_extra=PART_BODY)
async def add_part(upload_id: str, request: Request, services: ServicesDep) -> PartObject:
    """At most 64 MB; parts may come side by side."""
    async with services.database.begin() as session:
        await uploads.get_pending(session, upload_id, now=services.clock.now())
    part_id = f"part_{ids.random_suffix()}"
    key = paths.upload_part(upload_id, part_id)
    place = services.store.path(key)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with a_full_disk_is_an_answer():
            received = await receive_file(request, place, store=services.store, limit=MAX_PART, part="data")
        now = services.clock.now()
        row = UploadPart(id=part_id, upload_id=upload_id, bytes=received.bytes, key=key, created_at=now)
        async with services.database.begin() as session:
            await uploads.get_pending(session, upload_id, now=now)
            await uploads.add_part(session, row)
    except BaseException:
        place.unlink(missing_ok=True)
        raise
    return PartObject.of(row)


@router.post("/{upload_id}/complete", responses=docs(404, 409, 413))
async def complete_upload(upload_id: str, body: CompleteUpload, services: ServicesDep) -> UploadObject:
    """Join the parts in the given order into a file. Refused rows leave the upload pending."""
    async with services.database.begin() as session:
        upload = await uploads.get_pending(session, upload_id, now=services.clock.now())
        parts = await uploads.parts_in_order(session, upload, body.part_ids)
    services.store.require_room(upload.bytes)
    file_id = ids.new_file_id()
    async with arriving(services, file_id) as place:
        sha256, md5 = await asyncio.to_thread(_join, [services.store.path(part.key) for part in parts], place)
        if body.md5 is not None and body.md5.lower() != md5:
            raise UserError(f"the joined parts have md5 {md5}, not {body.md5}", param="md5")
        incoming = Incoming(upload.filename, upload.bytes, sha256, upload.purpose, upload.file_expires_after_s)

        async def completed(session: AsyncSession) -> None:
            row = await uploads.get_pending(session, upload_id, now=services.clock.now())
            await uploads.end(session, row, "completed", file_id)

        file = await keep(services, file_id, place, incoming, beside=completed)
    await _remove_parts(services, upload_id)
    return UploadObject.of(upload, FileObject.of(file), status="completed")


@router.post("/{upload_id}/cancel", responses=docs(404, 409))
async def cancel_upload(upload_id: str, services: ServicesDep) -> UploadObject:
    async with services.database.begin() as session:
        upload = await uploads.get_pending(session, upload_id, now=services.clock.now())
        await uploads.end(session, upload, "cancelled")
    await _remove_parts(services, upload_id)
    return UploadObject.of(upload)


def _join(parts: list[Path], target: Path) -> tuple[str, str]:
    """Concatenate `parts` into `target`; returns (sha256, md5) of the whole."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                while chunk := file.read(CHUNK):
                    sha256.update(chunk)
                    md5.update(chunk)
                    out.write(chunk)
    return sha256.hexdigest(), md5.hexdigest()


async def _remove_parts(services: Services, upload_id: str) -> None:
    await asyncio.to_thread(services.store.delete, paths.upload_part(upload_id, ""))


async def _sweep(services: Services) -> None:
    """Remove the parts of uploads that were never completed."""
    async with services.database.begin() as session:
        rows = await uploads.expired(session, now=services.clock.now())
        for row in rows:
            await uploads.end(session, row, "expired")
    for row in rows:
        await _remove_parts(services, row.id)
