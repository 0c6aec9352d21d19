"""Makes Ray Serve run the deployments that the table lists, looking again and again at what is (level-triggered).

    rows ──> applications wanted ──> cluster.serve(the whole list), when Serve shows another one
      ^                                          │
      └── states and messages <── observation <──┘        every reconcile_every_s, or wake()

Nothing is remembered that a restart would lose: the list is put once more then, and an unchanged application is left
alone by Serve. An application that fails is one entry of the list; the others stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.clock import Clock, SystemClock
from dpo_service.cluster.port import AppObservation, AppState, Cluster, ServeApplication
from dpo_service.db.session import Database
from dpo_service.deployments import repository
from dpo_service.deployments.applications import application, next_state
from dpo_service.deployments.tables import Deployment, DeploymentState
from dpo_service.errors import ClusterError
from dpo_service.registry import models
from dpo_service.settings import Settings
from dpo_service.specs.serve import EngineRequest
from dpo_service.storage.store import Store
from dpo_service.ticker import Ticker

logger = logging.getLogger(__name__)
FAILED_APP_KEPT = timedelta(minutes=10)
"""So long Serve may go on trying to mend a failed application; then it is taken away and only its row stays."""

Seen = Mapping[str, AppObservation]


class FinishedJob(Protocol):
    """What is needed of a job that published a model."""

    @property
    def fine_tuned_model(self) -> str | None: ...


class DeploymentReconciler(Ticker):
    """The one who puts the list of applications. Run one of it: two would agree, but not at once."""

    def __init__(
        self, database: Database, store: Store, cluster: Cluster, settings: Settings, clock: Clock | None = None
    ) -> None:
        super().__init__(settings.reconcile_every_s)
        self._database = database
        self._store = store
        self._cluster = cluster
        self._clock = clock or SystemClock()
        self._applied: list[ServeApplication] | None = None
        """The list put last by this process; None = none yet."""

    async def deploy_job(self, session: AsyncSession, job: FinishedJob) -> None:
        """Have the model a job published served, in the transaction that publishes it."""
        assert job.fine_tuned_model is not None
        model = await models.get(session, job.fine_tuned_model)
        await repository.ensure(
            session,
            model=model.id,
            model_path=str(self._store.path(model.key)),
            digest=model.digest,
            engine=EngineRequest(),
            now=self._clock.now(),
        )

    async def tick(self) -> None:
        """One look and what follows from it. Raises nothing of the cluster's."""
        rows = await self._rows()
        seen = await self._cluster.observe_applications()
        if seen is None:
            return  # blind: nothing is concluded, and nothing could be put
        try:
            if await self._decide_gpus(rows):
                rows = await self._rows()
            wanted = [application(row) for row in rows if self._is_wanted(row)]
            if self._differs(wanted, seen):
                await self._cluster.serve(wanted)
                self._applied = wanted
        except ClusterError as error:
            logger.warning("Ray Serve did not take the list of applications: %s", error.message)
            await self._tell_pending(rows, f"Waiting for the cluster: {error.message}")
            return
        await self._move(rows, {app.name for app in wanted}, seen)

    async def _rows(self) -> Sequence[Deployment]:
        async with self._database.begin() as session:
            return await repository.to_reconcile(session)

    async def _decide_gpus(self, rows: Sequence[Deployment]) -> bool:
        """Settle what a user left open, for good: True when something was written."""
        open_rows = [row for row in rows if row.engine.get("gpus") is None and row.state == DeploymentState.PENDING]
        if not open_rows:
            return False
        capacity = await self._cluster.capacity()
        async with self._database.begin() as session:
            for row in open_rows:
                engine = EngineRequest.model_validate(row.engine).decided(capacity.gpus)
                await repository.set_engine(session, row, engine.model_dump(mode="json"))
        return True

    def _is_wanted(self, row: Deployment) -> bool:
        if row.state == DeploymentState.FAILED:
            return self._clock.now() - row.updated_at < FAILED_APP_KEPT
        return row.state != DeploymentState.DELETING and row.engine.get("gpus") is not None

    def _differs(self, wanted: list[ServeApplication], seen: Seen) -> bool:
        """Whether Serve has to be told. An empty list is not put where Serve runs none of ours: that would start it."""
        ours = {name for name, app in seen.items() if app.state is not AppState.UNKNOWN}
        names = {app.name for app in wanted}
        if not names and not ours:
            return bool(self._applied)
        missing = {name for name in names if name not in seen or seen[name].state is AppState.ABSENT}
        return wanted != self._applied or bool(missing) or bool(ours - names)

    async def _move(self, rows: Sequence[Deployment], put: set[str], seen: Seen) -> None:
        now = self._clock.now()
        moves = [(row, move) for row in rows if (move := _next(row, put, seen)) is not None]
        moves = [(row, move) for row, move in moves if move != (row.state, row.message)]
        if not moves:
            return
        async with self._database.begin() as session:
            for row, (state, message) in moves:
                await self._write(session, row, state, message, now)

    async def _write(
        self, session: AsyncSession, row: Deployment, state: DeploymentState, message: str, now: datetime
    ) -> None:
        if await repository.move(session, row, state, message, now) and state != row.state:
            level = logging.WARNING if state is DeploymentState.FAILED else logging.INFO
            logger.log(level, "deployment %s of %s: %s -> %s %s", row.id, row.model, row.state, state.value, message)

    async def _tell_pending(self, rows: Sequence[Deployment], message: str) -> None:
        waiting = [row for row in rows if row.state == DeploymentState.PENDING and row.message != message]
        if waiting:
            async with self._database.begin() as session:
                for row in waiting:
                    await repository.move(session, row, DeploymentState.PENDING, message, self._clock.now())


def _next(row: Deployment, put: set[str], seen: Seen) -> tuple[DeploymentState, str] | None:
    """The next state and message of `row`, where `put` are the applications Serve was asked for; None = no change."""
    state, observed = DeploymentState(row.state), seen.get(row.id)
    if state is DeploymentState.DELETING:
        gone = observed is None or observed.state is AppState.ABSENT
        return (DeploymentState.DELETED, "") if gone else None
    if row.id not in put:
        return None
    if state is DeploymentState.PENDING and observed is None:
        return DeploymentState.STARTING, "Starting"
    return next_state(state, observed)
