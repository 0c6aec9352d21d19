"""Uploads in parts on the wire."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dpo_service.api.schemas.common import Wire
from dpo_service.api.schemas.files import FileObject
from dpo_service.clock import unix
from dpo_service.registry.tables import Upload, UploadPart

Short = Annotated[str, Field(min_length=1, max_length=255)]


class ExpiresAfter(Wire):
    anchor: Literal["created_at"]
    seconds: int


class CreateUpload(Wire):
    filename: Short
    bytes: Annotated[int, Field(ge=1, le=2**62)]
    mime_type: Short
    purpose: Short
    expires_after: ExpiresAfter | None = None


class CompleteUpload(Wire):
    part_ids: Annotated[list[str], Field(min_length=1, max_length=10_000)]
    md5: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


class UploadObject(Wire):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None

    @classmethod
    def of(cls, row: Upload, file: FileObject | None = None, status: str | None = None) -> UploadObject:
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=unix(row.created_at),
            expires_at=unix(row.expires_at),
            filename=row.filename,
            purpose=row.purpose,
            status=status or row.status,
            file=file,
        )


class PartObject(Wire):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str

    @classmethod
    def of(cls, row: UploadPart) -> PartObject:
        return cls(id=row.id, created_at=unix(row.created_at), upload_id=row.upload_id)
