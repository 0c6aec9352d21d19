"""How bytes become a file: streamed beside their place, read whole, then renamed and recorded. All of it or nothing.

receive ──> check rows (thread) ──> rename ──> row in the database
   └─────────────┴── any error, or a client gone: the directory of the file is removed
"""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.api import usage
from dpo_service.api.deps import Services
from dpo_service.errors import StorageFull, UserError
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.registry import files
from dpo_service.registry.tables import File
from dpo_service.rows.check import check_file
from dpo_service.rows.formats import BY_NAME
from dpo_service.storage import paths
from dpo_service.storage.store import Store

PURPOSE = "fine-tune"
EXPIRES_AFTER_S = (3600, 30 * 24 * 3600)
ARRIVING = ".arriving"
"""Name of a file's bytes until they are checked."""


@dataclass(frozen=True)
class Incoming:
    """A file that has arrived and is not yet stored."""

    name: str
    bytes: int
    sha256: str
    purpose: str
    expires_after_s: int | None = None


def require_purpose(purpose: str | None) -> str:
    """Raises UserError: missing, or one that is not served here."""
    if purpose != PURPOSE:
        said = f"purpose {purpose!r} is not served here" if purpose else "`purpose` is missing"
        raise UserError(f"{said}; send purpose={PURPOSE!r}", param="purpose")
    return purpose


def expires_after(fields: dict[str, str]) -> int | None:
    """Seconds after which the file goes, of the form's `expires_after[anchor]` and `expires_after[seconds]`."""
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor not in (None, "created_at"):
        raise UserError("expires_after[anchor] must be created_at", param="expires_after.anchor")
    return checked_seconds(int(seconds) if seconds and seconds.isdecimal() and len(seconds) < 12 else 0)


def checked_seconds(seconds: int) -> int:
    low, high = EXPIRES_AFTER_S
    if not low <= seconds <= high:
        raise UserError(f"expires_after[seconds] must be from {low} to {high}", param="expires_after.seconds")
    return seconds


def sweep_unfinished(store: Store) -> None:
    """Remove what uploads left that ended with the process. Only where no other process takes uploads."""
    for leftover in store.path("files").glob(f"*/{ARRIVING}"):
        shutil.rmtree(leftover.parent, ignore_errors=True)


@asynccontextmanager
async def arriving(services: Services, file_id: str) -> AsyncIterator[Path]:
    """A place for the bytes of `file_id`. Whatever goes wrong inside, its directory is gone afterwards."""
    directory = services.store.path(paths.file_key(file_id, "")).resolve()
    directory.mkdir(parents=True)
    try:
        with a_full_disk_is_an_answer():
            yield directory / ARRIVING
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


@contextmanager
def a_full_disk_is_an_answer() -> Iterator[None]:
    """Raises StorageFull where the block meets a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("the disk that holds the data directory is full; free some space") from error
        raise


async def keep(
    services: Services,
    file_id: str,
    arrived: Path,
    incoming: Incoming,
    *,
    beside: Callable[[AsyncSession], Awaitable[None]] | None = None,
) -> File:
    """Check the rows, put the file in its place and record it; `beside` is committed with it.

    Raises:
        InvalidData: a row cannot be trained on; carries the line.
    """
    report = await asyncio.to_thread(check_file, arrived, incoming.name)
    key = paths.file_key(file_id, incoming.name)
    await asyncio.to_thread(arrived.rename, services.store.path(key))
    row = _row(services, file_id, key, incoming, report)
    async with services.database.begin() as session:
        if beside is not None:
            await beside(session)
        return await files.create(session, row)


def _row(services: Services, file_id: str, key: str, incoming: Incoming, report: DatasetReport) -> File:
    now = services.clock.now()
    lifetime = incoming.expires_after_s
    return File(
        id=file_id,
        name=incoming.name,
        bytes=incoming.bytes,
        purpose=incoming.purpose,
        created_at=now,
        expires_at=now + timedelta(seconds=lifetime) if lifetime else None,
        status="processed",
        status_details=None,
        key=key,
        sha256=incoming.sha256,
        rows=BY_NAME[report.format].rows,
        format=report.format,
        n_rows=report.rows,
        report=report.model_dump(mode="json"),
    )


async def sweep_expired(services: Services) -> None:
    """Remove files whose time is over, but for those a live job still reads."""
    gone: list[str] = []
    async with services.database.begin() as session:
        for row in await files.expired(session, now=services.clock.now()):
            if not await usage.jobs_using_file(session, row.id):
                await files.delete(session, row)
                gone.append(row.id)
    for file_id in gone:
        await asyncio.to_thread(services.store.delete, paths.file_key(file_id, ""))
