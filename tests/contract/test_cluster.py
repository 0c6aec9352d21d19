"""What every cluster must do, asked of all of them: the fake, Ray on this machine, and a Ray that is only connected to.

The programs are real ones. On Ray they run; for the fake `Fake.unfold` plays what they would do.
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from dpo_service.cluster import serve_rest
from dpo_service.cluster.fake import FakeCluster
from dpo_service.cluster.local import LocalCluster
from dpo_service.cluster.port import AppState, Cluster, JobObservation, Liveness, ServeApplication
from dpo_service.cluster.ray_jobs import RayJobsCluster
from dpo_service.errors import ClusterError

ADDS = [sys.executable, "-c", "import os; print(int(os.environ['NUMBER']) + 1)"]
FAILS = [sys.executable, "-c", "raise SystemExit('b' + 2 * 'o' + 'm')"]
WAITS = [
    sys.executable,
    "-c",
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(4), print('sav' + 'ed'), sys.exit(0)))\n"
    "time.sleep(120)",
]
APP = ServeApplication(
    name="dep-echo",
    import_path="echo_app:build",
    args={"name": "first"},
    env={"PYTHONPATH": str(Path(__file__).parent), "PLANET": "earth"},
    user_config={"version": 1},
)


class Fake:
    """The fake, moved as the programs would move it."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()

    def unfold(self, submission_id: str) -> None:
        submission = next(each for each in self.cluster.submissions if each.submission_id == submission_id)
        self.cluster.start_running(submission_id)
        match list(submission.entrypoint):
            case program if program == ADDS:
                self.cluster.print(submission_id, f"{int(submission.env['NUMBER']) + 1}\n")
                self.cluster.finish(submission_id)
            case program if program == FAILS:
                self.cluster.finish(submission_id, succeeded=False, message="exit code 1: boom")
            case _:
                self.cluster.print(submission_id, "saved\n")

    def unfold_apps(self) -> None:
        for name, app in self.cluster.applications.items():
            missing = app.import_path.startswith("no_such_module")
            self.cluster.set_app(name, *((AppState.FAILED, "No module") if missing else (AppState.RUNNING,)))

    async def get(self, url: str) -> dict[str, Any] | None:
        return None


class Real:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def unfold(self, submission_id: str) -> None: ...

    def unfold_apps(self) -> None: ...

    async def get(self, url: str) -> dict[str, Any] | None:
        async with httpx.AsyncClient(trust_env=False) as client:
            response = await client.get(url)
        return dict(response.json()) if response.is_success else None


Backend = Fake | Real


@pytest.fixture(params=["fake", *(pytest.param(kind, marks=pytest.mark.ray) for kind in ("local", "ray_jobs"))])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    if request.param == "fake":
        yield Fake()
        return
    local: LocalCluster = request.getfixturevalue("ray_cluster")
    await local.start()
    cluster: Cluster = local
    if request.param == "ray_jobs":
        cluster = RayJobsCluster(local.dashboard, local.token, serve_port=httpx.URL(local.serve_url("")).port)
        await cluster.start()
    yield Real(cluster)
    await cluster.close()
    await local.close()


async def _ended(backend: Backend, submission_id: str) -> list[JobObservation]:
    """Every different observation up to the end."""
    seen = [await backend.cluster.observe(submission_id)]
    backend.unfold(submission_id)
    while seen[-1].liveness is not Liveness.GONE:
        await asyncio.sleep(0.05)
        now = await backend.cluster.observe(submission_id)
        seen += [now] if now != seen[-1] else []
    return seen


async def _apps_until(backend: Backend, accept: Callable[[dict[str, AppState]], bool]) -> dict[str, str]:
    """Messages by name, once the states are as wanted."""
    deadline = time.monotonic() + 60
    states: dict[str, AppState] = {}
    while time.monotonic() < deadline:
        seen = await backend.cluster.observe_applications()
        assert seen is not None
        states = {name: each.state for name, each in seen.items()}
        if accept(states):
            return {name: each.message for name, each in seen.items()}
        await asyncio.sleep(0.1)
    raise AssertionError(f"still {states}")


def _new_id() -> str:
    return f"job-{uuid.uuid4().hex[:8]}"


async def test_a_job_submitted_twice_runs_once(backend):
    job = _new_id()
    for _ in range(2):
        await backend.cluster.submit(job, ADDS, {"NUMBER": "41999"}, {"kind": "test"})
    seen = await _ended(backend, job)
    assert seen[0].liveness is Liveness.ALIVE
    assert seen[-1].succeeded is True
    await backend.cluster.submit(job, ADDS, {"NUMBER": "41999"}, {"kind": "test"})
    assert (await backend.cluster.observe(job)).liveness is Liveness.GONE
    assert (await backend.cluster.logs(job)).count("42000\n") == 1


async def test_a_failing_program_is_gone_and_says_why(backend):
    job = _new_id()
    await backend.cluster.submit(job, FAILS, {}, {})
    end = (await _ended(backend, job))[-1]
    assert (end.liveness, end.succeeded) == (Liveness.GONE, False)
    assert "boom" in end.message


async def test_a_stopped_job_has_time_to_save(backend):
    job = _new_id()
    await backend.cluster.submit(job, WAITS, {}, {})
    backend.unfold(job)
    while not (await backend.cluster.observe(job)).running:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5 if isinstance(backend, Real) else 0)
    await backend.cluster.stop(job)
    end = await backend.cluster.observe(job)
    while end.liveness is Liveness.ALIVE:
        await asyncio.sleep(0.05)
        end = await backend.cluster.observe(job)
    assert (end.liveness, end.succeeded) == (Liveness.GONE, False)
    assert "saved\n" in await backend.cluster.logs(job)
    await backend.cluster.stop(job)


async def test_a_job_nobody_knows_is_gone_without_a_verdict(backend):
    seen = await backend.cluster.observe("job-never-submitted")
    assert (seen.liveness, seen.running, seen.succeeded) == (Liveness.GONE, False, None)
    assert await backend.cluster.logs("job-never-submitted") == ""
    await backend.cluster.stop("job-never-submitted")


async def test_capacity_is_that_of_the_whole_cluster(backend):
    capacity = await backend.cluster.capacity()
    assert capacity.cpus == (8 if isinstance(backend, Fake) else 4)
    assert capacity.gpus == 0


@pytest.mark.timeout(120)
async def test_an_application_is_served_reconfigured_in_place_and_removed(backend):
    cluster = backend.cluster
    assert await cluster.observe_applications() == {}
    await cluster.serve([])
    assert await cluster.observe_applications() == {}

    await cluster.serve([APP])
    assert (await cluster.observe_applications())["dep-echo"].state in (AppState.STARTING, AppState.RUNNING)
    backend.unfold_apps()
    await _apps_until(backend, lambda states: states == {"dep-echo": AppState.RUNNING})
    first = await backend.get(cluster.serve_url("dep-echo"))
    assert first is None or (first["name"], first["planet"], first["version"]) == ("first", "earth", 1)

    await cluster.serve([replace(APP, user_config={"version": 2})])
    assert (await cluster.observe_applications())["dep-echo"].state is not AppState.FAILED
    await _apps_until(backend, lambda states: states == {"dep-echo": AppState.RUNNING})
    assert await backend.get(cluster.serve_url("dep-echo")) == (first and {**first, "version": 2})

    await cluster.serve([])
    await _apps_until(backend, lambda states: states == {})


@pytest.mark.timeout(120)
async def test_an_application_that_cannot_start_fails_with_the_reason_and_leaves_its_neighbour_alone(backend):
    broken = ServeApplication(name="dep-broken", import_path="no_such_module:build", args={})
    await backend.cluster.serve([APP, broken])
    backend.unfold_apps()
    wanted = {"dep-echo": AppState.RUNNING, "dep-broken": AppState.FAILED}
    messages = await _apps_until(backend, lambda states: states == wanted)
    assert "No module" in messages["dep-broken"]
    await backend.cluster.serve([])
    await _apps_until(backend, lambda states: states == {})


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", ["ray_jobs"], indirect=True)
async def test_applications_of_others_stay_as_they_are(backend, ray_cluster):
    port = httpx.URL(backend.cluster.serve_url("")).port
    theirs = serve_rest.document([replace(APP, name="theirs")], "127.0.0.1", port)
    headers = {"Authorization": f"Bearer {ray_cluster.token}"}
    async with httpx.AsyncClient(base_url=ray_cluster.dashboard, headers=headers, trust_env=False) as ray:

        async def put() -> dict[str, Any]:
            applications = (await ray.get("/api/serve/applications/")).json()["applications"]
            return {name: app["deployed_app_config"] for name, app in applications.items()}

        (await ray.put("/api/serve/applications/", json=theirs, timeout=60)).raise_for_status()
        before = await put()
        await backend.cluster.serve([APP])
        assert await put() == {**before, "dep-echo": (await put())["dep-echo"]}
        assert set(await backend.cluster.observe_applications()) == {"dep-echo"}
        await backend.cluster.serve([])
        await _apps_until(backend, lambda states: states == {})
        assert await put() == before
        (await ray.put("/api/serve/applications/", json=theirs | {"applications": []})).raise_for_status()
        while await put():
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("kind", ["fake", "local", "ray_jobs"])
async def test_blindness_is_not_an_ending(kind, tmp_path):
    cluster: Cluster = {
        "fake": lambda: FakeCluster(unreachable=True),
        "local": lambda: LocalCluster(tmp_path),
        "ray_jobs": lambda: RayJobsCluster("http://127.0.0.1:9"),
    }[kind]()
    seen = await cluster.observe("job-1")
    assert (seen.liveness, seen.running, seen.succeeded) == (Liveness.UNKNOWN, False, None)
    assert await cluster.observe_applications() is None
    for call in (
        cluster.submit("job-1", ADDS, {}, {}),
        cluster.stop("job-1"),
        cluster.logs("job-1"),
        cluster.capacity(),
        cluster.serve([APP]),
    ):
        with pytest.raises(ClusterError):
            await call
    await cluster.close()


@pytest.mark.ray
async def test_a_wrong_token_is_blindness_too_and_start_says_so(ray_cluster):
    cluster = RayJobsCluster(ray_cluster.dashboard, "wrong")
    with pytest.raises(ClusterError, match="token"):
        await cluster.start()
    assert (await cluster.observe("job-1")).liveness is Liveness.UNKNOWN
    await cluster.close()
