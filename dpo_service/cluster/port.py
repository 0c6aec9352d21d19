"""What the control plane may ask of a cluster. `local`, `ray_jobs` and `fake` answer, and pass one contract suite.

Observation has three values. UNKNOWN (the cluster cannot be reached, or does not say) changes nothing: a caller that
cannot see must not conclude that a job is dead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

OURS = "dep-"
"""The names of our applications begin so (ids.new_deployment_id). Others that Ray Serve runs are left as they are."""


class Liveness(StrEnum):
    ALIVE = "alive"
    """Accepted by the cluster: pending or running."""
    GONE = "gone"
    """Ended, or never heard of."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class JobObservation:
    liveness: Liveness
    running: bool = False
    """Alive and past its start."""
    succeeded: bool | None = None
    """For GONE: whether the entrypoint exited with 0; None = the cluster does not know the job."""
    message: str = ""


@dataclass(frozen=True)
class Capacity:
    """What the whole cluster has, free or not."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class ServeApplication:
    """One application of Ray Serve, in the terms of its REST schema."""

    name: str
    import_path: str
    args: Mapping[str, Any]
    env: Mapping[str, str] = field(default_factory=dict)
    user_config: Mapping[str, Any] | None = None
    """Changed alone, it reconfigures the replicas in place."""
    replicas: int = 1
    deployment: str = "Model"
    """The Serve deployment inside the application that `user_config` and `replicas` are for."""


class AppState(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"
    ABSENT = "absent"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class AppObservation:
    state: AppState
    message: str = ""


class Cluster(Protocol):
    """Ray's control side. All methods may raise ClusterError, but for the observations, which say UNKNOWN instead."""

    async def start(self) -> None:
        """Make the cluster usable: connect, or start it and find it again after a restart of the service."""
        ...

    async def close(self) -> None:
        """Let go of it. Jobs and served models go on."""
        ...

    async def shutdown(self) -> None:
        """End it where it is ours (`local`): daemons, jobs, served models, shared memory."""
        ...

    async def submit(
        self, submission_id: str, entrypoint: Sequence[str], env: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Start `entrypoint` under `submission_id`. Submitting the same id again starts nothing and is no error."""
        ...

    async def observe(self, submission_id: str) -> JobObservation: ...

    async def stop(self, submission_id: str) -> None:
        """Ask the job to end (SIGTERM, then SIGKILL). One that has ended, or is unknown, is fine."""
        ...

    async def logs(self, submission_id: str) -> str:
        """What the job has printed so far; "" for an unknown job."""
        ...

    async def capacity(self) -> Capacity: ...

    async def serve(self, applications: Sequence[ServeApplication]) -> None:
        """Make Ray Serve run exactly these applications of `OURS` (level-triggered: the whole list, idempotent)."""
        ...

    async def observe_applications(self) -> Mapping[str, AppObservation] | None:
        """The state of every application of `OURS` by name; None = unknown."""
        ...

    def serve_url(self, name: str) -> str:
        """Base URL under which application `name` answers HTTP."""
        ...
