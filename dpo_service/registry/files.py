"""Uploaded files: the rows about them. Functions take a session first and never commit; bytes are the caller's.

What a file is worth is known at upload: one meant for training is read whole, and refused with the line that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePosixPath

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.errors import NotFound
from dpo_service.registry.paging import Order, page
from dpo_service.registry.tables import File

MAX_NAME = 200
"""Bytes; file systems allow 255."""


def safe_name(name: str | None) -> str:
    """The last component of `name`, of letters, digits, dots, dashes, underscores and spaces, ending kept.

    >>> safe_name("../../etc/pass\\nwd.jsonl")
    'pass_wd.jsonl'
    """
    last = PurePosixPath((name or "").replace("\\", "/")).name
    clean = re.sub(r"[^\w.\- ]", "_", last).strip(" .")
    if len(clean.encode()) <= MAX_NAME:
        return clean or "file"
    endings = "".join(PurePosixPath(clean).suffixes[-2:]).encode()[-20:].decode(errors="ignore")
    stem = clean.removesuffix(endings).encode()[: MAX_NAME - len(endings.encode())]
    return stem.decode(errors="ignore") + endings


async def get(session: AsyncSession, file_id: str, *, now: datetime | None = None) -> File:
    """The file of that id.

    Raises:
        NotFound: nobody uploaded it, it was deleted, or (with `now`) it has expired.
    """
    row = await session.get(File, file_id)
    if row is None or (now is not None and row.expires_at is not None and row.expires_at <= now):
        raise NotFound(f"there is no file {file_id!r}; upload it first, or see GET /v1/files for the ones there are")
    return row


async def create(session: AsyncSession, file: File) -> File:
    session.add(file)
    await session.flush()
    return file


async def list_files(
    session: AsyncSession,
    *,
    now: datetime,
    after: str | None = None,
    limit: int = 100,
    order: Order = "desc",
    purpose: str | None = None,
) -> tuple[list[File], bool]:
    """A page of the files that have not expired, and whether more follow."""
    where = [or_(File.expires_at.is_(None), File.expires_at > now)]
    if purpose is not None:
        where.append(File.purpose == purpose)
    return await page(session, File, *where, after=after, limit=limit, order=order)


async def expired(session: AsyncSession, *, now: datetime) -> Sequence[File]:
    """The files whose time is over, for the caller to delete with their bytes."""
    return list(await session.scalars(select(File).where(File.expires_at <= now)))


async def delete(session: AsyncSession, file: File) -> None:
    """Remove the row. The caller has made sure that no live job uses it, and removes the bytes after the commit."""
    await session.delete(file)
    await session.flush()
