"""Ray on this machine, started by the service and left running when the service ends.

                    +--------- data directory ---------+
LocalCluster ------ | ray/state.json: pids, ports      | ---- Head: `ray start`, find again, end
    |               +----------------------------------+
    +--- everything else: RayJobsCluster at the head's dashboard

keeper (every KEEP_S): a daemon is dead -> end the rest, start the head again on the same ports and database
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_service.cluster.head import Head, HeadState
from dpo_service.cluster.port import AppObservation, Capacity, JobObservation, Liveness, ServeApplication
from dpo_service.cluster.ray_jobs import RayJobsCluster
from dpo_service.errors import ClusterError

KEEP_S = 5.0
ANSWER_TIMEOUT_S = 60.0

logger = logging.getLogger(__name__)


class LocalCluster:
    """One Ray head per data directory. Needs Ray with its dashboard (`ray[default]`), and `ray[serve]` to serve."""

    def __init__(self, data_dir: Path, *, num_cpus: int | None = None, serve_port: int | None = None) -> None:
        self.data_dir = data_dir
        self._head = Head(data_dir, num_cpus, serve_port)
        self._state: HeadState | None = None
        self._ray: RayJobsCluster | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def head_pid(self) -> int:
        return self._running().pids["gcs_server"]

    @property
    def address(self) -> str:
        """For ray.init(address=...), with `connection_environment` set."""
        return f"127.0.0.1:{self._running().ports.gcs}"

    @property
    def dashboard(self) -> str:
        return self._running().dashboard

    @property
    def token(self) -> str:
        return self._head.token

    @property
    def temp_dir(self) -> Path:
        return self._head.temp_dir

    def connection_environment(self) -> dict[str, str]:
        """Environment variables of a process that connects to the head. To be set before `ray` is imported."""
        return self._head.environment()

    async def start(self) -> None:
        await self._connect()
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        if self._ray is not None:
            await self._ray.close()
            self._ray = None

    async def shutdown(self) -> None:
        """Works without `start`: `dpo down` is another process than `dpo up`."""
        await self.close()
        await asyncio.to_thread(self._head.end)
        self._state = None

    async def submit(
        self, submission_id: str, entrypoint: Sequence[str], env: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        await self._jobs().submit(submission_id, entrypoint, env, metadata)

    async def observe(self, submission_id: str) -> JobObservation:
        if self._ray is None:
            return JobObservation(Liveness.UNKNOWN, message="not connected to Ray")
        return await self._ray.observe(submission_id)

    async def stop(self, submission_id: str) -> None:
        await self._jobs().stop(submission_id)

    async def logs(self, submission_id: str) -> str:
        return await self._jobs().logs(submission_id)

    async def capacity(self) -> Capacity:
        return await self._jobs().capacity()

    async def serve(self, applications: Sequence[ServeApplication]) -> None:
        ray = self._jobs()
        if applications:
            self._head.use_serve()
        if self._head.serve_used:
            await ray.serve(applications)

    async def observe_applications(self) -> Mapping[str, AppObservation] | None:
        if self._ray is None:
            return None
        return await self._ray.observe_applications() if self._head.serve_used else {}

    def serve_url(self, name: str) -> str:
        return self._jobs().serve_url(name)

    async def _connect(self) -> None:
        began = time.monotonic()
        state = await asyncio.to_thread(self._head.ensure)
        ray = RayJobsCluster(state.dashboard, self._head.token, serve_port=state.ports.serve)
        await _until_it_answers(ray)
        if self._ray is not None:
            await self._ray.close()
        self._state, self._ray = state, ray
        logger.info("Ray answers at %s after %.1f s", state.dashboard, time.monotonic() - began)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(KEEP_S)
            if await asyncio.to_thread(lambda: self._running().alive):
                continue
            logger.warning("Ray's head is dead; starting it again")
            try:
                await self._connect()
            except (ClusterError, RuntimeError):
                logger.exception("Ray's head does not come back; trying again in %g s", KEEP_S)

    def _running(self) -> HeadState:
        if self._state is None:
            raise ClusterError("Ray is not started on this machine")
        return self._state

    def _jobs(self) -> RayJobsCluster:
        if self._ray is None:
            raise ClusterError("not connected to Ray on this machine")
        return self._ray


async def _until_it_answers(ray: RayJobsCluster) -> None:
    """The dashboard is up some seconds after `ray start` returns, its job agent a little later."""
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while True:
        try:
            await ray.start()
            await ray.capacity()
            return
        except ClusterError:
            if time.monotonic() > deadline:
                await ray.close()
                raise
        await asyncio.sleep(0.1)
