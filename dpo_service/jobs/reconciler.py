"""Moves every job towards its end, looking again and again at what is (level-triggered): nothing has to be remembered
between two ticks, so another process, or this one after a crash, simply goes on.

    run ──> tick ──> claim by lease ──> step for each, side by side ──> release ──> wait
             ^                                                                       │
             └──────────────── reconcile_every_s, or wake() ─────────────────────────┘
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from random import Random

from dpo_service.clock import Clock, SystemClock
from dpo_service.cluster.port import Cluster
from dpo_service.db.session import Database
from dpo_service.errors import ClusterError
from dpo_service.jobs import lease
from dpo_service.jobs.context import Context, OnPublished, Point
from dpo_service.jobs.steps import step
from dpo_service.settings import Settings
from dpo_service.storage.store import Store
from dpo_service.ticker import Ticker

logger = logging.getLogger(__name__)
SIDE_BY_SIDE = 16


class Reconciler(Ticker):
    """One of any number of owners of the jobs in `database`."""

    def __init__(
        self,
        database: Database,
        store: Store,
        cluster: Cluster,
        settings: Settings,
        clock: Clock | None = None,
        *,
        base_url: str | None = None,
        on_published: OnPublished | None = None,
        reached: Callable[[Point], None] | None = None,
        random: Random | None = None,
    ) -> None:
        """`base_url`: where jobs reach the API; None = they only spool. `reached` and `random` are for tests."""
        super().__init__(settings.reconcile_every_s)
        self._context = Context(
            database=database,
            store=store,
            cluster=cluster,
            settings=settings,
            clock=clock or SystemClock(),
            base_url=base_url.rstrip("/") if base_url else None,
            on_published=on_published,
            reached=reached or (lambda _point: None),
            random=random or Random(),
        )

    async def tick(self) -> int:
        """Look once at every job that needs it; returns how many."""
        settings, database = self._context.settings, self._context.database
        token = secrets.token_hex(16)
        async with database.begin() as session:
            now = self._context.clock.now()
            owned = await lease.claim(
                session, token, lease_s=settings.lease_s, now=now, max_running=settings.max_running_jobs
            )
        if not owned:
            return 0
        try:
            async with lease.renewing(database, token, settings.lease_s):
                places = asyncio.Semaphore(SIDE_BY_SIDE)
                await asyncio.gather(*(self._step(job, places) for job in owned))
        finally:
            await self._release(token)
        return len(owned)

    async def _step(self, owned: lease.Owned, places: asyncio.Semaphore) -> None:
        async with places:
            try:
                await step(self._context, owned)
            except lease.StaleLease:
                logger.warning("job %s has another owner by now; leaving it alone", owned.job.id)
            except ClusterError as error:
                logger.warning("job %s: %s", owned.job.id, error.message)
            except Exception:
                logger.exception("job %s could not be reconciled; the next tick tries again", owned.job.id)

    async def _release(self, token: str) -> None:
        self._context.reached(Point.RELEASING)
        async with self._context.database.begin() as session:
            await lease.release(session, token)
