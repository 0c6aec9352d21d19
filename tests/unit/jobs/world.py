"""A control plane around a fake cluster: what the tests of jobs stand on."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import orjson
from sqlalchemy import text

from dpo_service import ids
from dpo_service.clock import FakeClock
from dpo_service.cluster.fake import FakeCluster
from dpo_service.db.session import Database
from dpo_service.jobs import repository, submit
from dpo_service.jobs.context import OnPublished, Point
from dpo_service.jobs.reconciler import Reconciler
from dpo_service.jobs.states import State
from dpo_service.jobs.tables import Job, JobEvent
from dpo_service.manifests.checkpoint import CheckpointManifest, RunResult
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.reports import Report
from dpo_service.settings import Settings
from dpo_service.specs.data import DataSpec
from dpo_service.specs.job import JobSpec
from dpo_service.specs.loss import LossSpec
from dpo_service.specs.method import ReferenceSpec
from dpo_service.specs.optim import OptimSpec
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.run import BatchSpec, ModelSource, RunSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store
from tests.databases import make_tables

POSTGRES = os.environ.get("DPO_TEST_POSTGRES_URL")
LONGEST_DELAY_S = 1000.0
REPORT = DatasetReport(format="pairs", rows=10, kept=10)


def job_spec(**fields: Any) -> JobSpec:
    wanted = {"model": "base", "training_file": "file-1", "method": {"type": "dpo"}, **fields}
    return JobSpec.model_validate(wanted)


def run_spec(job_id: str) -> RunSpec:
    return RunSpec(
        job_id=job_id,
        method="dpo",
        model=ModelSource(name="base", path="/models/base"),
        data=DataSpec(rows="pairs", training_file="files/file-1/a.jsonl", training_name="a.jsonl", max_length=64),
        loss=LossSpec(name="sigmoid"),
        reference=ReferenceSpec(mode="cached"),
        optim=OptimSpec(learning_rate=1e-5),
        batch=BatchSpec(batch_size=2, micro_batch_size=1, n_epochs=1),
        precision="float32",
        resources=ResourceSpec(),
        seed=0,
        output_model=ids.fine_tuned_model_id("base", None, job_id),
    )


def metrics_report(step: int, at: float = 100.0) -> Report:
    data = {"step": step, "split": "train", "loss": 0.5}
    return Report(key=f"metrics:train:{step}", created_at=at, type="metrics", message=f"Step {step}", data=data)


def checkpoint_report(
    job_id: str, step: int, digest: str = "d", at: float = 100.0, pruned: Sequence[int] = ()
) -> Report:
    key = paths.checkpoint_dir(job_id, step)
    data = {"step": step, "key": key, "digest": digest, "metrics": {"loss": 0.5}, "pruned": list(pruned)}
    return Report(key=f"checkpoint:{step}", created_at=at, type="checkpoint", message="saved", data=data)


def progress_report(done: int, at: float, stage: str = "train") -> Report:
    data = {"stage": stage, "done": done, "total": 10}
    return Report(key=f"progress:{stage}:{done}:{at}", created_at=at, type="progress", message="", data=data)


class World:
    """Database, storage, cluster and clock, which outlive the reconcilers that work on them."""

    def __init__(self, root: Path, url: str, **settings: Any) -> None:
        self.database = Database(url)
        self.store = Store(root)
        self.cluster = FakeCluster()
        self.clock = FakeClock()
        defaults = {
            "data_dir": root,
            "cluster": "fake",
            "lease_s": 30.0,
            "max_running_jobs": 100,
            "inspect_models": False,
        }
        self.settings = Settings.model_validate({**defaults, **settings})
        self.current = self.reconciler()

    def reconciler(
        self,
        reached: Callable[[Point], None] | None = None,
        on_published: OnPublished | None = None,
        **settings: Any,
    ) -> Reconciler:
        """One more reconciler on the same database, as after a restart or in another process."""
        return Reconciler(
            self.database,
            self.store,
            self.cluster,
            self.settings.model_copy(update=settings),
            self.clock,
            base_url="http://control:8000",
            on_published=on_published,
            reached=reached,
            random=Random(0),
        )

    async def tick(self, times: int = 1) -> None:
        for _ in range(times):
            await self.current.tick()

    async def submit(self, **fields: Any) -> str:
        job_id = ids.new_job_id()
        self.clock.advance(0.001)
        await submit.create(self.database, run_spec(job_id), job_spec(**fields), REPORT, clock=self.clock)
        return job_id

    async def running(self, **fields: Any) -> str:
        """A job whose first attempt runs."""
        job_id = await self.submit(**fields)
        await self.tick()
        self.cluster.start_running(ids.submission_id(job_id, 1))
        await self.tick()
        assert await self.state(job_id) is State.RUNNING
        return job_id

    async def job(self, job_id: str) -> Job:
        async with self.database.begin() as session:
            return await repository.get_job(session, job_id)

    async def state(self, job_id: str) -> State:
        return (await self.job(job_id)).job_state

    async def events(self, job_id: str) -> list[JobEvent]:
        async with self.database.begin() as session:
            return list(await repository.events_since(session, job_id, 0, limit=10_000))

    async def ingest(self, job_id: str, reports: list[Report], attempt: int = 1) -> int:
        async with self.database.begin() as session:
            return await repository.ingest(session, ids.submission_id(job_id, attempt), reports)

    async def run_sql(self, statement: str) -> None:
        async with self.database.begin() as session:
            await session.execute(text(statement))

    async def expire_leases(self) -> None:
        """As if the owners had been silent for longer than their leases."""
        await self.run_sql("UPDATE jobs SET lease_until = '2000-01-01 00:00:00.000000'")

    def spool(self, job_id: str, reports: list[Report], attempt: int = 1, source: str = "driver") -> Path:
        path = self.store.path(f"{paths.spool_dir(job_id, attempt)}/{source}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(orjson.dumps(report.model_dump()) + b"\n" for report in reports))
        return path

    def write_result(self, job_id: str, attempt: int, status: str, **fields: Any) -> None:
        """What the runner does last."""
        if status == "succeeded":
            manifest = CheckpointManifest(
                job_id=job_id, step=5, epoch=1.0, files=(), digest="d5", model_digest="m5", base_model="base",
                base_digest="b",
            )  # fmt: skip
            checkpoint = paths.checkpoint_dir(job_id, 5)
            self.store.write_model(f"{checkpoint}/manifest.json", manifest)
            fields = {"checkpoint": checkpoint, "checkpoint_digest": "d5", "trained_tokens": 1234, **fields}
        result = RunResult(job_id=job_id, attempt=attempt, status=status, **fields)
        self.store.write_model(paths.attempt_result(job_id, attempt), result)

    def succeed(self, job_id: str, attempt: int = 1) -> None:
        self.write_result(job_id, attempt, "succeeded")
        self.cluster.finish(ids.submission_id(job_id, attempt), succeeded=True)

    def fail(self, job_id: str, attempt: int = 1, **fields: Any) -> None:
        self.write_result(job_id, attempt, "failed", error_message="boom", **fields)
        self.cluster.finish(ids.submission_id(job_id, attempt), succeeded=False)

    def stop(self, job_id: str, attempt: int = 1) -> None:
        """It has seen its stop flag, and saved."""
        self.write_result(job_id, attempt, "stopped")
        self.cluster.finish(ids.submission_id(job_id, attempt))

    def die(self, job_id: str, attempt: int = 1) -> None:
        self.cluster.finish(ids.submission_id(job_id, attempt), succeeded=False, message="killed")

    def submissions_of(self, job_id: str) -> list[str]:
        prefix = ids.submission_id(job_id, 0)[:-1]
        return [s.submission_id for s in self.cluster.submissions if s.submission_id.startswith(prefix)]


@asynccontextmanager
async def open_world(root: Path, url: str | None = None, **settings: Any) -> AsyncIterator[World]:
    """A world on an empty database: SQLite in `root`, unless `url` says otherwise."""
    root.mkdir(parents=True, exist_ok=True)
    world = World(root, url or f"sqlite+aiosqlite:///{root}/service.db", **settings)
    await make_tables(world.database)
    try:
        yield world
    finally:
        await world.database.close()


@asynccontextmanager
async def postgres_database() -> AsyncIterator[str]:
    """The URL of an empty database on the test PostgreSQL."""
    assert POSTGRES is not None
    name = f"dpo_{uuid.uuid4().hex[:10]}"
    await _administer(f"CREATE DATABASE {name}")
    try:
        yield f"{POSTGRES.rsplit('/', 1)[0]}/{name}"
    finally:
        await _administer(f"DROP DATABASE {name} WITH (FORCE)")


async def _administer(statement: str) -> None:
    database = Database(str(POSTGRES))
    async with database.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text(statement))
    await database.close()
