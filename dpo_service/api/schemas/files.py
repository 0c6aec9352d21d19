"""Files on the wire (OpenAI's File object, plus what the service found in it)."""

from __future__ import annotations

from typing import Literal

from dpo_service.api.schemas.common import Wire
from dpo_service.clock import unix
from dpo_service.registry.tables import File
from dpo_service.specs.method import RowKind


class FileObject(Wire):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None = None
    # ours
    sha256: str
    rows: RowKind | None = None
    """What it holds: pairs (preference rows) or answers (supervised rows)."""
    format: str | None = None
    n_rows: int | None = None

    @classmethod
    def of(cls, row: File) -> FileObject:
        return cls.model_validate(
            {
                "id": row.id,
                "bytes": row.bytes,
                "created_at": unix(row.created_at),
                "expires_at": unix(row.expires_at) if row.expires_at else None,
                "filename": row.name,
                "purpose": row.purpose,
                "status": row.status,
                "status_details": row.status_details,
                "sha256": row.sha256,
                "rows": row.rows,
                "format": row.format,
                "n_rows": row.n_rows,
            }
        )


class FileList(Wire):
    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None
