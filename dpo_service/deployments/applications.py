"""A deployment as an application of Ray Serve, and what Serve says of one as a deployment's next state. Pure."""

from __future__ import annotations

import re

from dpo_service.cluster.port import AppObservation, AppState, ServeApplication
from dpo_service.deployments.tables import Deployment, DeploymentState
from dpo_service.specs.serve import EngineSpec, ServeSpec

IMPORT_PATH = "dpo_service.serve.app:build"
MESSAGE_LENGTH = 600
_CAUSE = re.compile(r"^\s*(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)\b.*$", re.MULTILINE)

NEXT = {
    AppState.STARTING: DeploymentState.STARTING,
    AppState.RUNNING: DeploymentState.RUNNING,
    AppState.FAILED: DeploymentState.FAILED,
}


def application(row: Deployment) -> ServeApplication:
    """A function of the row alone: the same row after a restart changes nothing, so Serve restarts no replica."""
    spec = ServeSpec(
        deployment_id=row.id,
        model_id=row.model,
        model_path=row.model_path,
        checkpoint_digest=row.digest,
        engine=EngineSpec.model_validate(row.engine),
    )
    return ServeApplication(name=row.id, import_path=IMPORT_PATH, args=spec.model_dump(mode="json"))


def next_state(state: DeploymentState, seen: AppObservation | None) -> tuple[DeploymentState, str] | None:
    """Where a deployment in `state` stands when its application, which was asked for, is `seen`; None = no change."""
    if seen is None or seen.state is AppState.ABSENT:
        # It has just been asked for, or Serve has lost it and is asked again.
        return (DeploymentState.STARTING, "Starting") if state is DeploymentState.RUNNING else None
    if seen.state is AppState.UNKNOWN:
        return None
    message = {AppState.STARTING: "Loading the model", AppState.RUNNING: ""}.get(seen.state, reason(seen.message))
    return NEXT[seen.state], message


def reason(message: str) -> str:
    """The cause out of Serve's message, which holds whole tracebacks: from the last exception's name on."""
    found = list(_CAUSE.finditer(message))
    text = message[found[-1].start() :] if found else message
    return " ".join(text.split())[:MESSAGE_LENGTH] or "Ray Serve gave no reason; its logs may"
