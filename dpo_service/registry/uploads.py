"""Files that arrive in parts: the rows about them. Functions take a session first and never commit."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.errors import Conflict, NotFound, UserError
from dpo_service.registry.tables import Upload, UploadPart


async def get(session: AsyncSession, upload_id: str, *, now: datetime) -> Upload:
    """The upload; one whose time is over is marked as expired. Raises NotFound."""
    row = await session.get(Upload, upload_id, with_for_update=True)
    if row is None:
        raise NotFound(f"there is no upload {upload_id!r}; make one with POST /v1/uploads")
    if row.status == "pending" and row.expires_at <= now:
        row.status = "expired"
    return row


async def get_pending(session: AsyncSession, upload_id: str, *, now: datetime) -> Upload:
    """Raises NotFound, or Conflict when it has been completed or cancelled, or has expired."""
    row = await get(session, upload_id, now=now)
    if row.status != "pending":
        raise Conflict(f"upload {upload_id!r} is {row.status}; make a new one with POST /v1/uploads")
    return row


async def parts_in_order(session: AsyncSession, upload: Upload, part_ids: Sequence[str]) -> list[UploadPart]:
    """The named parts, whose bytes must add up to what the upload was announced with.

    Raises:
        UserError: an unknown part, one named twice, or another sum.
    """
    found = {p.id: p for p in await session.scalars(select(UploadPart).where(UploadPart.upload_id == upload.id))}
    for index, part_id in enumerate(part_ids):
        if part_id not in found:
            raise UserError(f"upload {upload.id!r} has no part {part_id!r}", param=f"part_ids.{index}")
    if len(set(part_ids)) != len(part_ids):
        raise UserError("a part is named twice", param="part_ids")
    parts = [found[part_id] for part_id in part_ids]
    total = sum(part.bytes for part in parts)
    if total != upload.bytes:
        raise UserError(
            f"the parts have {total:,} bytes, the upload was announced with {upload.bytes:,}", param="part_ids"
        )
    return parts


async def add_part(session: AsyncSession, part: UploadPart) -> None:
    session.add(part)
    await session.flush()


async def end(session: AsyncSession, upload: Upload, status: str, file_id: str | None = None) -> None:
    """Close the upload and forget its parts; the caller removes their bytes after the commit."""
    upload.status, upload.file_id = status, file_id
    await session.execute(delete(UploadPart).where(UploadPart.upload_id == upload.id))
    await session.flush()


async def expired(session: AsyncSession, *, now: datetime) -> Sequence[Upload]:
    """Uploads whose time is over and whose parts are still there."""
    query = select(Upload).where(Upload.expires_at <= now, Upload.status.in_(("pending", "expired")))
    return list(
        await session.scalars(query.where(select(UploadPart.id).where(UploadPart.upload_id == Upload.id).exists()))
    )
