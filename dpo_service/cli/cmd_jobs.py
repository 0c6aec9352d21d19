"""`dpo submit`, `jobs`, `watch`, `metrics`, `logs`, `pause`, `resume` and `cancel`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dpo_service.cli.client import Json, Service, job_path
from dpo_service.cli.context import ApiKey, AsJson, DataDir, Url, connect
from dpo_service.cli.exits import ExitCode

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job, as ftjob-...")]


def register(app: typer.Typer) -> None:
    app.command("submit")(submit)
    app.command("jobs")(jobs)
    app.command("watch")(watch)
    app.command("metrics")(metrics)
    app.command("logs")(logs)
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("cancel")(cancel)


def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job file (.yaml), or a file of rows to train on.")],
    model: Annotated[
        str | None, typer.Option(help="The model to train: hub id, name, path, or an earlier result.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="dpo, ipo, orpo, simpo, kto or supervised. [default: dpo]")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set a field of the job: learning_rate=1e-5, eval.split=0.1, n_epochs=2."
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job until it has ended.")] = False,
    deploy: Annotated[bool, typer.Option("--deploy", help="Serve the result as soon as it is published.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> int:
    """Submit a training job; local files it names are uploaded first."""
    from dpo_service.cli.jobfile import build
    from dpo_service.cli.output import err, out, print_json

    document = build(file, model=model, method=method, settings=settings or [], deploy=deploy)
    service = connect(url, api_key, data_dir)
    job = create_job(service, document)
    if watch:
        err.print(f"Job {job['id']} was accepted. Ctrl-C stops watching, not the job.")
        return _follow(service, str(job["id"]), as_json=as_json)
    if as_json:
        print_json(job)
    else:
        out.print(f"Job [bold]{job['id']}[/bold] was accepted. Follow it with: dpo watch {job['id']}", soft_wrap=True)
    return int(ExitCode.OK)


def create_job(service: Service, document: Json) -> Json:
    """Upload the local files a job document names, then create the job. A refused job leaves no file of ours behind."""
    with uploaded(service, document) as complete:
        return service.post("/v1/fine_tuning/jobs", complete)


@contextmanager
def uploaded(service: Service, document: Json, *, keep: bool = True) -> Iterator[Json]:
    """`document` with ids in the place of local files, uploaded for it. They are deleted again if what is done within
    is refused, or they are not to be kept."""
    from dpo_service.cli.exits import CliError
    from dpo_service.cli.jobfile import local_files, with_file
    from dpo_service.cli.output import err

    document, file_ids = dict(document), list[str]()
    try:
        for field, path in local_files(document).items():
            file = service.upload(path)
            file_ids.append(str(file["id"]))
            document = with_file(document, field, str(file["id"]))
            err.print(f"Uploaded {path} as {file['id']} ({int(file['bytes']):,} bytes).", soft_wrap=True)
        yield document
    except CliError:
        _forget(service, file_ids)
        raise
    if not keep:
        _forget(service, file_ids)


def _forget(service: Service, file_ids: list[str]) -> None:
    from contextlib import suppress

    from dpo_service.cli.exits import CliError

    for file_id in file_ids:
        with suppress(CliError):
            service.delete(f"/v1/files/{file_id}")


def jobs(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many, newest first.")] = 20,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs, newest first."""
    from rich.markup import escape

    from dpo_service.cli.output import job_status, moment, out, print_json, status, table

    page = connect(url, api_key, data_dir).get("/v1/fine_tuning/jobs", limit=limit)
    if as_json:
        for job in page["data"]:
            print_json(job)
        return
    rows = [
        (
            str(job["id"]),
            status(job_status(job)),
            str((job.get("method") or {}).get("type", "")),
            escape(str(job["model"])),
            escape(str(job.get("fine_tuned_model") or "")),
            moment(job["created_at"]),
        )
        for job in page["data"]
    ]
    out.print(
        table(("job", "status", "method", "model", "result", "created"), rows) if rows else "There are no jobs yet."
    )


def watch(
    job_id: JobId, url: Url = None, api_key: ApiKey = None, data_dir: DataDir = None, as_json: AsJson = False
) -> int:
    """Follow a job live until it has ended. Exit code 1: it failed or was cancelled."""
    return _follow(connect(url, api_key, data_dir), job_id, as_json=as_json)


def _follow(service: Service, job_id: str, *, as_json: bool) -> int:
    from dpo_service.cli.output import out
    from dpo_service.cli.watch import follow, require_success

    job, _ = follow(service, job_id, as_json=as_json)
    require_success(job)
    if not as_json:
        result = job["fine_tuned_model"]
        # Waiting for a deployment that is already under way is the same command as asking for one.
        then = "it is being deployed; wait for it with" if job.get("deploy") else "serve it with"
        out.print(
            f"Job {job_id} succeeded. Its model is [bold]{result}[/bold]; {then}: dpo deploy {result} --wait",
            soft_wrap=True,
        )
    return int(ExitCode.OK)


def metrics(
    job_id: JobId, url: Url = None, api_key: ApiKey = None, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """Show how every training metric of a job went, and its warnings; --json: a line of values a step."""
    from dpo_service.cli.output import err, out, print_json
    from dpo_service.cli.watch import Progress, summary

    progress = Progress(job_id)
    service = connect(url, api_key, data_dir)
    for event in reversed(list(service.pages(f"{job_path(job_id)}/events", limit=100))):
        progress.take(event)
        if as_json and event["type"] == "metrics":
            print_json(event["data"])
    if as_json:
        return
    out.print(summary(progress.history) if progress.history else "The job has not trained yet.")
    for warning in progress.warnings.values():
        err.print(f"Warning: {warning}", style="bold yellow", markup=False, soft_wrap=True)


def logs(
    job_id: JobId, url: Url = None, api_key: ApiKey = None, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """Print what a job's processes have printed."""
    import sys

    from dpo_service.cli.output import print_json

    text = connect(url, api_key, data_dir).text(f"{job_path(job_id)}/logs")
    if as_json:
        print_json({"id": job_id, "logs": text})
    else:
        sys.stdout.write(text if not text or text.endswith("\n") else text + "\n")


def pause(
    job_id: JobId, url: Url = None, api_key: ApiKey = None, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """Pause a job: a running one saves a checkpoint and gives its workers back."""
    _wish(connect(url, api_key, data_dir), job_id, "pause", as_json=as_json)


def resume(
    job_id: JobId, url: Url = None, api_key: ApiKey = None, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """Resume a paused job at the step it was paused at."""
    _wish(connect(url, api_key, data_dir), job_id, "resume", as_json=as_json)


def cancel(
    job_id: JobId, url: Url = None, api_key: ApiKey = None, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """Cancel a job. A running one saves a checkpoint first."""
    _wish(connect(url, api_key, data_dir), job_id, "cancel", as_json=as_json)


def _wish(service: Service, job_id: str, verb: str, *, as_json: bool) -> None:
    from dpo_service.cli.output import job_status, out, print_json, status

    job = service.post(f"{job_path(job_id)}/{verb}")
    if as_json:
        print_json(job)
    else:
        out.print(f"Job {job_id} is asked to {verb}; it is {status(job_status(job))}.", soft_wrap=True)
