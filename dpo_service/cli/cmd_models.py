"""`dpo models`, `deploy` and `undeploy`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from dpo_service.cli.client import Json, Service, deployment_path
from dpo_service.cli.context import ApiKey, AsJson, DataDir, Url, connect
from dpo_service.cli.exits import CliError, ExitCode

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model, as `dpo models` lists them.")]
WAIT_S = 600


def register(app: typer.Typer) -> None:
    app.command("models")(models)
    app.command("deploy")(deploy)
    app.command("undeploy")(undeploy)


def models(url: Url = None, api_key: ApiKey = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the models there are, and which of them are being served."""
    from rich.markup import escape

    from dpo_service.cli.output import moment, out, print_json, status, table

    service = connect(url, api_key, data_dir)
    listed = service.get("/v1/models")["data"]
    served = {str(d["model"]): str(d["status"]) for d in service.pages("/v1/deployments")}
    if as_json:
        for model in listed:
            print_json({**model, "deployment": served.get(str(model["id"]))})
        return
    names = {str(model["id"]): model for model in listed}
    rows = [
        (
            escape(name),
            status(served.get(name, "")),
            escape(str(model.get("owned_by", ""))),
            moment(model.get("created")),
        )
        for name, model in names.items()
    ]
    rows += [(escape(name), status(state), "", "") for name, state in served.items() if name not in names]
    out.print(table(("model", "served", "owner", "created"), rows) if rows else "There are no models yet.")


def deploy(
    model: ModelName,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the model answers, or has failed.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model under /v1/chat/completions. Exit code 1 with --wait: it did not come up."""
    from dpo_service.cli.output import err, out, print_json

    service = connect(url, api_key, data_dir)
    deployment = service.post("/v1/deployments", {"model": model})
    if wait:
        with err.status(f"Waiting for {model} to come up"):
            deployment = wait_running(service, str(deployment["id"]))
    if as_json:
        print_json(deployment)
    elif wait:
        out.print(f"[bold]{model}[/bold] answers. Talk to it with: dpo chat {model}", soft_wrap=True)
    else:
        out.print(f"[bold]{model}[/bold] is being deployed ({deployment['id']}). See `dpo models`.", soft_wrap=True)


def wait_running(service: Service, deployment_id: str, timeout_s: float = WAIT_S) -> Json:
    """Poll a deployment until it runs.

    Raises:
        CliError: it failed, was taken away, or took longer than `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        deployment = service.get(deployment_path(deployment_id))
        state = str(deployment["status"])
        if state == "running":
            return deployment
        if state not in ("pending", "starting"):
            reason = deployment.get("error") or deployment.get("message") or "no reason was given"
            text = reason.get("message", reason) if isinstance(reason, dict) else reason
            raise CliError(f"{deployment['model']} did not come up, it is {state}: {text}", ExitCode.FAILED)
        if time.monotonic() > deadline:
            raise CliError(f"{deployment['model']} did not come up in {timeout_s:.0f} s", ExitCode.FAILED)
        time.sleep(1)


def undeploy(
    model: ModelName, url: Url = None, api_key: ApiKey = None, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """Stop serving a model (or the deployment of that id). Its files stay."""
    from dpo_service.cli.output import out, print_json

    service = connect(url, api_key, data_dir)
    found = [d for d in service.pages("/v1/deployments") if model in (d["id"], d["model"])]
    if not found:
        raise CliError(f"{model} is not being served; `dpo models` shows what is", ExitCode.REFUSED)
    for deployment in found:
        answer = service.delete(deployment_path(str(deployment["id"])))
        if as_json:
            print_json(answer)
        else:
            out.print(f"{deployment['model']} is no longer served.", soft_wrap=True)
