"""What the reconciler's steps work with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.clock import Clock
from dpo_service.cluster.port import Cluster
from dpo_service.db.session import Database
from dpo_service.jobs import lease
from dpo_service.jobs.tables import Job
from dpo_service.settings import Settings
from dpo_service.storage.store import Store

OnPublished = Callable[[AsyncSession, Job], Awaitable[None]]
"""Called in the transaction that publishes the model of a job with `deploy`: what it writes is committed with it."""


class Point(StrEnum):
    """Places at which a process may die, between one effect and the next. Tests make it die there."""

    CLAIMED = "claimed"
    SPEC_WRITTEN = "spec_written"
    ATTEMPT_COMMITTED = "attempt_committed"
    SUBMITTED = "submitted"
    SUBMISSION_NOTED = "submission_noted"
    OBSERVED = "observed"
    STOP_FLAG_WRITTEN = "stop_flag_written"
    BATCH_INGESTED = "batch_ingested"
    RESULT_READ = "result_read"
    CONCLUDED = "concluded"
    RELEASING = "releasing"


def _nothing(_point: Point) -> None:
    return None


@dataclass(frozen=True)
class Context:
    database: Database
    store: Store
    cluster: Cluster
    settings: Settings
    clock: Clock
    base_url: str | None = None
    """Where a job reaches the API; None = it only spools."""
    on_published: OnPublished | None = None
    reached: Callable[[Point], None] = _nothing
    random: Random = field(default_factory=Random)

    def guarded(self, owned: lease.Owned) -> AbstractAsyncContextManager[tuple[AsyncSession, Job]]:
        """A transaction in which the job is certain to be ours, and its row as it is now."""
        return lease.guarded(self.database, owned, self.settings.lease_s)
