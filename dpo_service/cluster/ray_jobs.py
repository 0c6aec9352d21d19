"""An existing Ray cluster, asked over its dashboard's HTTP API (jobs, Serve, nodes). Needs no `import ray`.

Paths as in ray.dashboard.modules, Ray 2.60: /api/jobs/, /api/serve/applications/, /api/v0/nodes.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from dpo_service.cluster import serve_rest
from dpo_service.cluster.port import AppObservation, Capacity, JobObservation, Liveness, ServeApplication
from dpo_service.errors import ClusterError
from dpo_service.hosts import is_loopback

SERVE_PORT = 8000
"""Where Ray Serve listens unless it is told otherwise."""
STOP_WAIT_S = 20
"""From SIGTERM to SIGKILL. Ray's own 3 s are too short to save a checkpoint."""
TIMEOUT = httpx.Timeout(15.0, connect=3.0)
SERVE_TIMEOUT = httpx.Timeout(90.0, connect=3.0)
"""The first PUT starts Serve's controller and proxy."""
MESSAGE_CHARS = 4000


class RayJobsCluster:
    """`address`: the dashboard's, e.g. http://head:8265. `token`: of Ray's token authentication, if that is on."""

    def __init__(self, address: str, token: str | None = None, *, serve_port: int | None = None) -> None:
        self._address = address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._host = urlsplit(self._address).hostname or "127.0.0.1"
        self._serve_port = serve_port or SERVE_PORT
        self._client: httpx.AsyncClient | None = None

    async def start(self) -> None:
        """Raises ClusterError when the dashboard does not answer, or does not accept the token."""
        response = await self._ask("GET", "/api/version")
        _require_success(response, "connect")

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def shutdown(self) -> None:
        """The cluster is not ours to end."""
        await self.close()

    async def submit(
        self, submission_id: str, entrypoint: Sequence[str], env: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        response = await self._ask("POST", "/api/jobs/", json=submission(submission_id, entrypoint, env, metadata))
        # The id is taken, so an earlier call of ours was heard: that is what the caller wants to know.
        if response.is_error and "already exists" in response.text:
            return
        _require_success(response, f"submit {submission_id}")

    async def observe(self, submission_id: str) -> JobObservation:
        try:
            response = await self._ask("GET", _job_path(submission_id))
            if response.status_code == 404:
                return JobObservation(Liveness.GONE, message="The cluster does not know this job.")
            _require_success(response, "observe")
            return observation(response.json())
        except (ClusterError, ValueError, KeyError) as error:
            return JobObservation(Liveness.UNKNOWN, message=str(error))

    async def stop(self, submission_id: str) -> None:
        response = await self._ask("POST", f"{_job_path(submission_id)}/stop")
        if response.status_code != 404:
            _require_success(response, f"stop {submission_id}")

    async def logs(self, submission_id: str) -> str:
        response = await self._ask("GET", f"{_job_path(submission_id)}/logs")
        if response.status_code == 404:
            return ""
        _require_success(response, f"read the log of {submission_id}")
        return str(response.json()["logs"] or "")

    async def capacity(self) -> Capacity:
        response = await self._ask("GET", "/api/v0/nodes?limit=10000")
        _require_success(response, "list the nodes")
        nodes = response.json()["data"]["result"]["result"]
        totals = [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]
        return Capacity(
            cpus=sum(float(total.get("CPU", 0.0)) for total in totals),
            gpus=sum(float(total.get("GPU", 0.0)) for total in totals),
        )

    async def serve(self, applications: Sequence[ServeApplication]) -> None:
        details = await self._serve_details()
        if not applications and not details.get("controller_info"):
            return  # an empty list would start Serve
        host = "127.0.0.1" if is_loopback(self._host) else "0.0.0.0"
        wanted = serve_rest.document(applications, host, self._serve_port, serve_rest.others(details))
        response = await self._ask("PUT", "/api/serve/applications/", json=wanted, limit=SERVE_TIMEOUT)
        _require_success(response, "deploy")

    async def observe_applications(self) -> Mapping[str, AppObservation] | None:
        try:
            return serve_rest.observations(await self._serve_details())
        except (ClusterError, ValueError, KeyError):
            return None

    def serve_url(self, name: str) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._serve_port}/{name}"

    async def _serve_details(self) -> dict[str, Any]:
        response = await self._ask("GET", "/api/serve/applications/", limit=SERVE_TIMEOUT)
        _require_success(response, "ask Serve")
        return dict(response.json())

    async def _ask(self, method: str, path: str, *, json: Any = None, limit: httpx.Timeout = TIMEOUT) -> httpx.Response:
        """Any answer at all; ClusterError when there is none."""
        if self._client is None:
            # Proxies of the environment are for the outside, never for the cluster.
            self._client = httpx.AsyncClient(base_url=self._address, headers=self._headers, trust_env=False)
        try:
            return await self._client.request(method, path, json=json, timeout=limit)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ClusterError(f"Ray's dashboard at {self._address} does not answer: {reason}") from error


def submission(
    submission_id: str, entrypoint: Sequence[str], env: Mapping[str, str], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """The body of POST /api/jobs/."""
    return {
        "submission_id": submission_id,
        # `exec`: no shell between Ray and the entrypoint that would take the stop signal for itself.
        "entrypoint": f"exec {shlex.join(entrypoint)}",
        # A job that waits for an entrypoint CPU cannot be stopped; the service does its own admission.
        "entrypoint_num_cpus": 0,
        "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **env}},
        "metadata": dict(metadata),
    }


def observation(job: Mapping[str, Any]) -> JobObservation:
    """Ray's JobDetails as an observation. Of a long message the first line is kept, which says what happened, and the
    end, where a traceback ends."""
    headline, _, rest = str(job.get("message") or "").partition("\n")
    message = headline[-MESSAGE_CHARS:] + (f"\n{rest[-MESSAGE_CHARS:]}" if rest else "")
    match job["status"]:
        case "PENDING":
            return JobObservation(Liveness.ALIVE, message=message)
        case "RUNNING":
            return JobObservation(Liveness.ALIVE, running=True, message=message)
        case "SUCCEEDED":
            return JobObservation(Liveness.GONE, succeeded=True, message=message)
        case "FAILED" | "STOPPED":
            return JobObservation(Liveness.GONE, succeeded=False, message=message)
        case other:
            return JobObservation(Liveness.UNKNOWN, message=f"Ray says {other}")


def _job_path(submission_id: str) -> str:
    return f"/api/jobs/{quote(submission_id, safe='')}"


def _require_success(response: httpx.Response, what: str) -> None:
    if response.status_code in (401, 403):
        raise ClusterError(f"cannot {what}: Ray refuses the token; set RAY_AUTH_TOKEN to the cluster's")
    if response.is_error:
        # Ray answers with a whole traceback; its last line is the sentence.
        lines = response.text.strip().splitlines() or [""]
        raise ClusterError(f"cannot {what}: Ray answered {response.status_code}: {lines[-1]}")
