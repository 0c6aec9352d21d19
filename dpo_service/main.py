"""The composition root: settings in, running service out. The one place that knows every part.

    up = migrate -> cluster -> API + job reconciler + deployment reconciler, in one process, one data directory
    api, reconciler, migrate = the same parts, one a process, for a cluster

Two files in the data directory say who holds it: `service.lock` is locked for as long as a service runs on it (the
kernel lets go when the process dies, however it dies), `service.json` says where that service answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import httpx
import orjson
import psutil
import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from dpo_service.api.app import create_app
from dpo_service.api.uploads import sweep_unfinished
from dpo_service.clock import SystemClock
from dpo_service.cluster.fake import FakeCluster
from dpo_service.cluster.local import LocalCluster
from dpo_service.cluster.port import Cluster
from dpo_service.cluster.ray_jobs import RayJobsCluster
from dpo_service.db.migrate import upgrade
from dpo_service.db.session import Database
from dpo_service.deployments.reconciler import DeploymentReconciler
from dpo_service.errors import UserError
from dpo_service.jobs.reconciler import Reconciler
from dpo_service.settings import Settings
from dpo_service.storage.store import Store
from dpo_service.telemetry import log

EXIT_OK, EXIT_FAILED, EXIT_HELD = 0, 1, 5
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
Role = Literal["up", "api", "reconciler"]


@dataclass(frozen=True)
class Service:
    """Every part, built and wired, nothing started."""

    settings: Settings
    database: Database
    cluster: Cluster
    jobs: Reconciler
    deployments: DeploymentReconciler
    app: FastAPI


def compose(settings: Settings) -> Service:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    database, store = Database(settings.sqlalchemy_url), Store(settings.data_dir)
    cluster, clock = _cluster(settings), SystemClock()
    deployments = DeploymentReconciler(database, store, cluster, settings, clock)
    jobs = Reconciler(
        database,
        store,
        cluster,
        settings,
        clock,
        base_url=f"http://{settings.host}:{settings.port}",
        on_published=deployments.deploy_job,
    )

    def wake() -> None:
        jobs.wake()
        deployments.wake()

    app = create_app(settings, database, store, cluster, on_change=wake)
    return Service(settings, database, cluster, jobs, deployments, app)


def _cluster(settings: Settings) -> Cluster:
    match settings.cluster:
        case "local":
            return LocalCluster(settings.data_dir, num_cpus=settings.local_cpus, serve_port=settings.serve_port)
        case "ray_jobs":
            assert settings.ray_address is not None, "Settings has looked"
            token = os.environ.get("RAY_AUTH_TOKEN")
            return RayJobsCluster(settings.ray_address, token, serve_port=settings.serve_port)
        case "fake":
            return FakeCluster()


@asynccontextmanager
async def running(service: Service, role: Role) -> AsyncIterator[None]:
    """The background half of the service: the cluster and the reconcilers. Jobs outlive it."""
    stop = asyncio.Event()
    await service.cluster.start()
    loops = [service.jobs.run(stop), service.deployments.run(stop)] if role != "api" else []
    try:
        async with asyncio.TaskGroup() as tasks:
            for loop in loops:
                tasks.create_task(loop)
            try:
                yield
            finally:
                stop.set()
    finally:
        await service.cluster.close()
        await service.database.close()


async def serve(settings: Settings, role: Role = "up") -> None:
    """Run until SIGTERM or SIGINT. Prints one line when ready."""
    # Before Ray is started: a port that is taken is known at once, and leaves nothing behind.
    listener = None if role == "reconciler" else bound(settings.host, settings.port)
    await asyncio.to_thread(upgrade, settings.sqlalchemy_url)
    service = compose(settings)
    if listener is None:
        stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        async with running(service, role):
            await stopped.wait()
        return
    config = uvicorn.Config(service.app, log_config=None, timeout_graceful_shutdown=5)
    async with running(service, role):
        await _AnnouncingServer(config, settings).serve([listener])


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address, and does not answer yet. Raises UserError where it cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"the service cannot listen on {host}, port {port}: {error.strerror or error}; choose another with --port "
            "(DPO_PORT) or --host (DPO_HOST), or stop what has it"
        ) from None
    return listener


class _AnnouncingServer(uvicorn.Server):
    """Says where it answers, on standard output and in `service.json`, once it does."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        data_dir, url = self._settings.data_dir.resolve(), f"http://{self._settings.host}:{self._settings.port}"
        note = {"pid": os.getpid(), "url": url, "data_dir": str(data_dir), "started_at": time.time()}
        Store(data_dir).write("service.json", orjson.dumps(note))
        print(_ready(url, data_dir, os.getpid()), flush=True)


def _ready(url: str, data_dir: Path, pid: int) -> str:
    return f"ready: {url}/v1 (data in {data_dir}, process {pid})"


# --- one machine: up, down ---------------------------------------------------------------------------------------


@contextmanager
def _held(data_dir: Path) -> Iterator[IO[str] | None]:
    """The data directory's lock, or None when another process has it."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "service.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file


def holder(data_dir: Path) -> dict[str, object] | None:
    """Who serves this data directory: `pid`, `url`, `started_at`; None when nobody does."""
    with _held(data_dir) as lock:
        if lock is not None:
            return None
    with contextlib.suppress(OSError, orjson.JSONDecodeError):
        return dict(orjson.loads((data_dir / "service.json").read_bytes()))
    return {"pid": None, "url": None}


def up(settings: Settings, *, detach: bool = False) -> int:
    """Run the whole service on one data directory.

    Returns an exit status: 0 after an orderly end (or, detached, once it is ready), 1 when it did not start,
    5 when another service holds the directory.
    """
    if detach:
        return _up_detached(settings)
    with _held(settings.data_dir) as lock:
        if lock is None:
            return _report_holder(settings.data_dir)
        (settings.data_dir / "service.json").unlink(missing_ok=True)
        log.configure(file=settings.data_dir / "logs" / "service.log")
        sweep_unfinished(Store(settings.data_dir))
        return _run(settings, "up")


def _run(settings: Settings, role: Role) -> int:
    try:
        asyncio.run(serve(settings, role))
    except UserError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _report_holder(data_dir: Path) -> int:
    who = holder(data_dir) or {}
    place = f"process {who.get('pid')}, serving {who.get('url')}" if who.get("pid") else "a service that is starting"
    print(f"{data_dir} is held by {place}; use it, or stop it with: dpo down --data-dir {data_dir}", file=sys.stderr)
    return EXIT_HELD


def _up_detached(settings: Settings) -> int:
    if holder(settings.data_dir) is not None:
        return _report_holder(settings.data_dir)
    output = settings.data_dir / "logs" / "up.log"
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "dpo_service.main", "up"],
            env=os.environ | environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    if _wait_ready(settings, process):
        print(_ready(f"http://{settings.host}:{settings.port}", settings.data_dir.resolve(), process.pid))
        return EXIT_OK
    tail = "\n".join(output.read_text(errors="replace").splitlines()[-15:])
    print(f"the service did not start; {output} says:\n{tail}", file=sys.stderr)
    return EXIT_FAILED


def _wait_ready(settings: Settings, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        note = settings.data_dir / "service.json"
        if note.exists() and orjson.loads(note.read_bytes())["pid"] == process.pid:
            with contextlib.suppress(httpx.HTTPError):
                url = f"http://{settings.host}:{settings.port}/livez"
                if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                    return True
        time.sleep(0.1)
    return False


def environment(settings: Settings) -> dict[str, str]:
    """`settings` as the environment variables they are read from."""
    values = settings.model_dump(mode="json", exclude={"api_keys"}, exclude_none=True)
    variables = {f"DPO_{name.upper()}": _encoded(value) for name, value in values.items()}
    variables["DPO_API_KEYS"] = orjson.dumps([key.get_secret_value() for key in settings.api_keys]).decode()
    return variables


def _encoded(value: object) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def down(data_dir: Path) -> int:
    """End the service on `data_dir` and the Ray it started, served models and running jobs included."""
    data_dir = data_dir.resolve()
    if not data_dir.is_dir():
        print(f"nothing runs on {data_dir}: there is no such directory", file=sys.stderr)
        return EXIT_FAILED
    who = holder(data_dir)
    if who and isinstance(who.get("pid"), int):
        _terminate(int(str(who["pid"])))
    asyncio.run(LocalCluster(data_dir).shutdown())
    (data_dir / "service.json").unlink(missing_ok=True)
    print(f"stopped (data stay in {data_dir})")
    return EXIT_OK


def _terminate(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except psutil.TimeoutExpired:
            process.kill()


def main(arguments: list[str]) -> int:
    """`python -m dpo_service.main up | api | reconciler | migrate`, set up by DPO_ environment variables."""
    try:
        settings = Settings()
    except ValidationError as error:
        print("; ".join(str(e["msg"]).removeprefix("Value error, ") for e in error.errors()), file=sys.stderr)
        return 2
    match arguments:
        case ["up"]:
            return up(settings)
        case ["migrate"]:
            upgrade(settings.sqlalchemy_url)
        case ["api"]:
            return _run(settings, "api")
        case ["reconciler"]:
            return _run(settings, "reconciler")
        case _:
            print(main.__doc__, file=sys.stderr)
            return 2
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
