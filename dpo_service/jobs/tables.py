"""The tables of jobs.

jobs 1 ──< job_attempts       one row a try; its key is the cluster's submission id
     1 ──< job_events         what the user reads; every move of the state machine is one of them
     1 ──< job_checkpoints    what can be served or resumed from
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from dpo_service.db.base import Base
from dpo_service.jobs.states import State
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.specs.job import JobSpec
from dpo_service.specs.run import RunSpec


class Job(Base):
    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    state: Mapped[str] = mapped_column(String(16))
    attempt: Mapped[int] = mapped_column(default=0)
    """Number of the newest attempt, from 1; 0 = none yet."""
    not_before: Mapped[datetime | None]
    """A queued job waits until then."""
    failures: Mapped[int] = mapped_column(default=0, server_default="0")
    """Attempts that failed and were followed by another. One that was paused is none of them."""
    cancel_requested_at: Mapped[datetime | None]
    pause_requested_at: Mapped[datetime | None]
    """None again when the job is resumed."""
    paused_at: Mapped[datetime | None]
    """Since when it is paused; None = it is not."""

    spec: Mapped[dict[str, Any]]
    """JobSpec as submitted."""
    run: Mapped[dict[str, Any]]
    """RunSpec: the same, every number decided."""
    meta: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    deploy: Mapped[bool] = mapped_column(default=False)

    report: Mapped[dict[str, Any] | None]
    """DatasetReport made when the job was accepted."""
    dataset: Mapped[dict[str, Any] | None]
    """DatasetManifest reported by the data stage."""
    reference_digest: Mapped[str | None] = mapped_column(String(64))
    """Digest of the weights the loss measures against, as the newest attempt found or made them; None = none yet."""
    progress: Mapped[dict[str, Any] | None]
    """Where the running stage stands (jobs/progress.py)."""

    fine_tuned_model: Mapped[str | None] = mapped_column(String(256))
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(Text)
    error_param: Mapped[str | None] = mapped_column(String(256))

    lease_token: Mapped[str | None] = mapped_column(String(64))
    lease_until: Mapped[datetime | None]
    """By the database's clock."""

    __table_args__ = (
        Index(None, "created_at", "id"),
        Index(None, "state", "created_at"),
        Index(None, "lease_token"),
    )

    @property
    def job_state(self) -> State:
        return State(self.state)

    @property
    def stop_requested_at(self) -> datetime | None:
        """When the newest attempt was first asked to stop, to pause or for good."""
        return min(filter(None, (self.pause_requested_at, self.cancel_requested_at)), default=None)

    @property
    def job_spec(self) -> JobSpec:
        return JobSpec.model_validate(self.spec)

    @property
    def run_spec(self) -> RunSpec:
        return RunSpec.model_validate(self.run)

    @property
    def dataset_report(self) -> DatasetReport | None:
        return DatasetReport.model_validate(self.report) if self.report is not None else None


class JobAttempt(Base):
    __tablename__ = "job_attempts"

    submission_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    token_hash: Mapped[str] = mapped_column(String(64))
    """sha256 of the token that admits its reports."""
    created_at: Mapped[datetime]
    submitted_at: Mapped[datetime | None]
    """When the cluster had accepted it; None = it may not have been asked."""
    running_at: Mapped[datetime | None]
    stop_sent_at: Mapped[datetime | None]
    """When the cluster was last told to end it by force."""
    gone_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(Text)
    """How it ended, in words."""

    __table_args__ = (UniqueConstraint("job_id", "attempt"),)


class JobEvent(Base):
    __tablename__ = "job_events"

    sequence: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    """Grows within a job in the order of commits, because every writer locks the job's row first."""
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    key: Mapped[str] = mapped_column(String(256))
    """What makes it one event however often it is reported."""
    created_at: Mapped[datetime]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(16))
    """message | metrics"""
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None]
    actor: Mapped[str | None] = mapped_column(String(32))
    """Who moved the job (user | reconciler); None = not a move."""
    from_state: Mapped[str | None] = mapped_column(String(16))
    to_state: Mapped[str | None] = mapped_column(String(16))

    __table_args__ = (
        UniqueConstraint("job_id", "key"),
        Index(None, "job_id", "sequence"),
        {"sqlite_autoincrement": True},
    )


class JobCheckpoint(Base):
    __tablename__ = "job_checkpoints"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int]
    key: Mapped[str] = mapped_column(Text)
    """Storage key of the checkpoint's directory."""
    digest: Mapped[str] = mapped_column(String(64))
    model_id: Mapped[str] = mapped_column(String(256))
    """The name under which this checkpoint can be asked for."""
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]

    __table_args__ = (UniqueConstraint("job_id", "step"),)
