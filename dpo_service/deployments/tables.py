"""The table of deployments: which models are meant to be served, and how far that has got."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Index, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from dpo_service.db.base import Base


class DeploymentState(StrEnum):
    """pending -> starting -> running, any of them -> failed; all of them -> deleting -> deleted."""

    PENDING = "pending"
    """Written down; the cluster has not been asked yet."""
    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"
    DELETING = "deleting"
    DELETED = "deleted"


LIVE = (DeploymentState.PENDING, DeploymentState.STARTING, DeploymentState.RUNNING, DeploymentState.FAILED)
"""States in which a deployment holds its model's name."""
_HOLDS_NAME = text("state IN ('pending', 'starting', 'running', 'failed')")


class Deployment(Base):
    """One model behind Ray Serve. The id is also the name of the Serve application."""

    __tablename__ = "deployments"
    __table_args__ = (
        # Two requests at once cannot both deploy a model: the second meets this index.
        Index(
            "uq_deployments_model_live", "model", unique=True, sqlite_where=_HOLDS_NAME, postgresql_where=_HOLDS_NAME
        ),
        Index("ix_deployments_state", "state"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    model: Mapped[str] = mapped_column(String(512))
    """The name clients use in `model`."""
    model_path: Mapped[str] = mapped_column(String(1024))
    """A directory the replicas can read, or a hub id."""
    digest: Mapped[str | None] = mapped_column(String(128))
    """Identity of a published checkpoint; None for the user's own models."""
    engine: Mapped[dict[str, Any]]
    """EngineSpec, every value decided."""
    state: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    """What is going on, or why it failed, for a person."""
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
