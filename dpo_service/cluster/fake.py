"""A cluster in memory: what the control plane's tests drive instead of Ray. It passes the suite the real ones pass.

Jobs stand still until a test moves them: submit -> `start_running` -> `finish`, or `forget`. A stopped job ends at once
unless `stubborn` is set. Applications start in STARTING and are moved by `set_app`. `unreachable` cuts the wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dpo_service.cluster.port import (
    AppObservation,
    AppState,
    Capacity,
    JobObservation,
    Liveness,
    ServeApplication,
)
from dpo_service.errors import ClusterError

PENDING = JobObservation(Liveness.ALIVE, message="Job has not started yet.")
RUNNING = JobObservation(Liveness.ALIVE, running=True, message="Job is currently running.")
STOPPED = JobObservation(Liveness.GONE, succeeded=False, message="Job was intentionally stopped.")
NEVER_HEARD_OF = JobObservation(Liveness.GONE, succeeded=None, message="The cluster does not know this job.")


@dataclass(frozen=True)
class Submission:
    """One accepted call of `submit`."""

    submission_id: str
    entrypoint: tuple[str, ...]
    env: Mapping[str, str]
    metadata: Mapping[str, str]


@dataclass
class FakeCluster:
    """`submissions`, `stops` and `applications` are what it was asked; the other attributes are set by the test."""

    capacity_value: Capacity = field(default_factory=lambda: Capacity(cpus=8.0, gpus=0.0))
    unreachable: bool = False
    stubborn: bool = False
    """Jobs ignore `stop` until the test finishes them."""
    submissions: list[Submission] = field(default_factory=list)
    """Accepted ones only: a duplicate is not listed twice."""
    stops: list[str] = field(default_factory=list)
    applications: dict[str, ServeApplication] = field(default_factory=dict)
    started: bool = False
    _jobs: dict[str, JobObservation] = field(default_factory=dict)
    _logs: dict[str, str] = field(default_factory=dict)
    _apps: dict[str, AppObservation] = field(default_factory=dict)

    # What the test does.

    def start_running(self, submission_id: str) -> None:
        self._jobs[submission_id] = RUNNING if self._alive(submission_id) else self._jobs[submission_id]

    def finish(self, submission_id: str, succeeded: bool = True, message: str = "") -> None:
        self._jobs[submission_id] = JobObservation(Liveness.GONE, succeeded=succeeded, message=message)

    def forget(self, submission_id: str) -> None:
        """As after a head that died with its memory."""
        self._jobs.pop(submission_id, None)
        self._logs.pop(submission_id, None)

    def print(self, submission_id: str, text: str) -> None:
        """Append to the job's log."""
        self._logs[submission_id] = self._logs.get(submission_id, "") + text

    def set_app(self, name: str, state: AppState, message: str = "") -> None:
        if state is AppState.ABSENT:
            self._apps.pop(name, None)
        else:
            self._apps[name] = AppObservation(state, message)

    # The port.

    async def start(self) -> None:
        self._reach()
        self.started = True

    async def close(self) -> None:
        self.started = False

    async def shutdown(self) -> None:
        self._jobs.clear()
        self._logs.clear()
        self._apps.clear()
        self.applications.clear()
        self.started = False

    async def submit(
        self, submission_id: str, entrypoint: Sequence[str], env: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        self._reach()
        if submission_id in self._jobs:
            return
        self._jobs[submission_id] = PENDING
        self.submissions.append(Submission(submission_id, tuple(entrypoint), dict(env), dict(metadata)))

    async def observe(self, submission_id: str) -> JobObservation:
        if self.unreachable:
            return JobObservation(Liveness.UNKNOWN, message="unreachable")
        return self._jobs.get(submission_id, NEVER_HEARD_OF)

    async def stop(self, submission_id: str) -> None:
        self._reach()
        self.stops.append(submission_id)
        if self._alive(submission_id) and not self.stubborn:
            self._jobs[submission_id] = STOPPED

    async def logs(self, submission_id: str) -> str:
        self._reach()
        return self._logs.get(submission_id, "")

    async def capacity(self) -> Capacity:
        self._reach()
        return self.capacity_value

    async def serve(self, applications: Sequence[ServeApplication]) -> None:
        self._reach()
        wanted = {app.name: app for app in applications}
        self._apps = {name: seen for name, seen in self._apps.items() if name in wanted}
        for name, app in wanted.items():
            if name not in self._apps or not _only_user_config_differs(app, self.applications[name]):
                self._apps[name] = AppObservation(AppState.STARTING)
        self.applications = wanted

    async def observe_applications(self) -> Mapping[str, AppObservation] | None:
        return None if self.unreachable else dict(self._apps)

    def serve_url(self, name: str) -> str:
        return f"http://serve.invalid/{name}"

    def _alive(self, submission_id: str) -> bool:
        seen = self._jobs.get(submission_id)
        return seen is not None and seen.liveness is Liveness.ALIVE

    def _reach(self) -> None:
        if self.unreachable:
            raise ClusterError("the cluster cannot be reached: unreachable")


def _only_user_config_differs(new: ServeApplication, old: ServeApplication) -> bool:
    """True also for equal ones. Anything else that changes replaces the replicas."""
    return replace(new, user_config=None) == replace(old, user_config=None)
