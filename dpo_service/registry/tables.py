"""Tables of what users bring and what jobs make: files, uploads in parts, published models; and answered requests."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from dpo_service.db.base import Base


class File(Base):
    """An uploaded file. The row is written after its bytes: a row without bytes cannot be."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_created_at_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    """As uploaded, sanitised; its ending says how it is read."""
    bytes: Mapped[int] = mapped_column(BigInteger)
    purpose: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    status: Mapped[str] = mapped_column(String(16))
    """uploaded | processed | error"""
    status_details: Mapped[str | None]
    key: Mapped[str] = mapped_column(String(512))
    """Storage key of the bytes."""
    sha256: Mapped[str] = mapped_column(String(64))
    rows: Mapped[str | None] = mapped_column(String(16))
    """What the file holds (`RowKind`: pairs | answers); None where it was not read."""
    format: Mapped[str | None] = mapped_column(String(64))
    n_rows: Mapped[int | None]
    report: Mapped[dict[str, Any] | None]
    """The `DatasetReport` made at upload, without a tokenizer."""


class Upload(Base):
    """A file that arrives in parts (`/v1/uploads`)."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    filename: Mapped[str] = mapped_column(String(255))
    bytes: Mapped[int] = mapped_column(BigInteger)
    purpose: Mapped[str] = mapped_column(String(32))
    mime_type: Mapped[str] = mapped_column(String(255))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    status: Mapped[str] = mapped_column(String(16))
    """pending | completed | cancelled | expired"""
    file_id: Mapped[str | None] = mapped_column(String(64))
    file_expires_after_s: Mapped[int | None]


class UploadPart(Base):
    """One part of an upload; its bytes lie in storage until the upload ends."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    key: Mapped[str] = mapped_column(String(512))
    created_at: Mapped[datetime]


class PublishedModel(Base):
    """A model made by a job: its result, or one of its checkpoints."""

    __tablename__ = "models"
    __table_args__ = (Index("ix_models_created_at_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(String(255), primary_key=True)
    base: Mapped[str] = mapped_column(String(512))
    """The model it was trained from, as the job named it."""
    job_id: Mapped[str] = mapped_column(String(64), index=True)
    step: Mapped[int | None]
    """Set for a checkpoint, None for a result."""
    key: Mapped[str] = mapped_column(String(512))
    """Storage key of the model directory (Hugging Face layout)."""
    digest: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime]
    owned_by: Mapped[str] = mapped_column(String(64))


class AnsweredRequest(Base):
    """A request that must not be done twice, and what was answered. The primary key decides who does it."""

    __tablename__ = "answered_requests"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    """sha256 over the caller, the route and the caller's Idempotency-Key."""
    body_hash: Mapped[str] = mapped_column(String(64), index=True)
    resource_id: Mapped[str] = mapped_column(String(64))
    """What the request made."""
    response: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(index=True)
