"""Ray Serve's REST documents: our applications as Serve's declarative schema, and Serve's statuses as ours.

Source: ray.serve.schema, ServeDeploySchema (what is PUT) and ServeInstanceDetails (what is read), Ray 2.60.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_service.cluster.port import OURS, AppObservation, AppState, ServeApplication

STATE_OF: Mapping[str, AppState] = {
    "NOT_STARTED": AppState.STARTING,
    "DEPLOYING": AppState.STARTING,
    "RUNNING": AppState.RUNNING,
    "DEPLOY_FAILED": AppState.FAILED,
    "UNHEALTHY": AppState.FAILED,
    # Neither there nor gone: UNKNOWN makes a caller look again.
    "DELETING": AppState.UNKNOWN,
}


def document(
    applications: Sequence[ServeApplication], host: str, port: int, others: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The whole list: what is not in it, Serve removes, so it has `others` too. HTTP options count only when Serve
    starts."""
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": host, "port": port},
        "logging_config": {"enable_access_log": False},
        "applications": [*others, *(_application(app) for app in applications)],
    }


def _application(app: ServeApplication) -> dict[str, Any]:
    deployment: dict[str, Any] = {"name": app.deployment, "num_replicas": app.replicas}
    if app.user_config is not None:
        deployment["user_config"] = dict(app.user_config)
    return {
        "name": app.name,
        "route_prefix": f"/{app.name}",
        "import_path": app.import_path,
        "args": dict(app.args),
        "runtime_env": {"env_vars": dict(app.env)},
        "deployments": [deployment],
    }


def observations(details: Mapping[str, Any]) -> dict[str, AppObservation]:
    """Ours, from the answer to GET /api/serve/applications/."""
    return {name: _observation(app) for name, app in details.get("applications", {}).items() if name.startswith(OURS)}


def others(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The applications that somebody else has put, as they were put; those deployed from Python stay by themselves."""
    return [
        {**app["deployed_app_config"], "name": name}
        for name, app in details.get("applications", {}).items()
        if not name.startswith(OURS) and app.get("deployed_app_config") and app["status"] != "DELETING"
    ]


def _observation(app: Mapping[str, Any]) -> AppObservation:
    state = STATE_OF.get(app["status"], AppState.UNKNOWN)
    return AppObservation(state, "\n".join(dict.fromkeys(_messages(app))) if state is not AppState.RUNNING else "")


def _messages(app: Mapping[str, Any]) -> Iterator[str]:
    """The application's own words first, then each deployment's: the cause is mostly in the latter."""
    deployments = app.get("deployments") or {}
    yield from filter(None, [app.get("message"), *(each.get("message") for each in deployments.values())])
