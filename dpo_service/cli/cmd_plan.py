"""`dpo plan`: what a job needs and takes, before it runs; without a service, unless one is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo_service.cli.context import ApiKey, AsJson
from dpo_service.cli.exits import CliError, ExitCode

if TYPE_CHECKING:
    from rich.table import Table

BAR = 40
GIB = 2**30


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job file (YAML), or rows to train on.")],
    model: Annotated[str | None, typer.Option(help="The model: a directory, or a hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="dpo, ipo, orpo, simpo, ...")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a field of the job; may be repeated.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="Plan for this device: H100-80, A100-40, L4, cpu, ...")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, max=1024, help="How many.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="Ask this service, for its models and files.")] = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> int:
    """Say what a job needs and takes: memory by part, time, GPU-hours. Nothing runs. Exit code 3: it does not fit."""
    from dpo_service.cli.jobfile import build
    from dpo_service.cli.output import print_json

    document = build(file, model=model, method=method, settings=settings or [], deploy=False)
    found = _asked(document, url, api_key, gpu, gpus) if url else _made_here(document, gpu, gpus)
    if as_json:
        print_json(found)
    else:
        show(found)
    return int(ExitCode.OK if found["plan"]["fits"] else ExitCode.REFUSED)


def _made_here(document: dict[str, Any], gpu: str | None, gpus: int | None) -> dict[str, Any]:
    import asyncio

    from pydantic import ValidationError

    from dpo_service.api.schemas.plans import PlanObject
    from dpo_service.api.sentences import describe
    from dpo_service.errors import DpoServiceError
    from dpo_service.jobs.plan import plan_here
    from dpo_service.specs.job import JobSpec

    try:
        planned = asyncio.run(plan_here(JobSpec.model_validate(document), gpu=gpu, gpus=gpus))
    except ValidationError as error:
        findings = [dict(finding, loc=("body", *finding["loc"])) for finding in error.errors()]
        raise CliError(describe(findings, JobSpec)[1], ExitCode.REFUSED) from None
    except DpoServiceError as error:
        raise CliError(error.message, ExitCode.REFUSED) from None
    return PlanObject.of(planned).model_dump(mode="json")


def _asked(
    document: dict[str, Any], url: str, api_key: str | None, gpu: str | None, gpus: int | None
) -> dict[str, Any]:
    """The service's plan; files that were uploaded for it are deleted again."""
    from dpo_service.cli.cmd_jobs import uploaded
    from dpo_service.cli.context import connect

    service = connect(url, api_key, None)
    asked = {"gpu": gpu, "gpus": gpus}
    with uploaded(service, document, keep=False) as complete:
        return service.post(
            "/v1/fine_tuning/jobs/plan", complete, {name: value for name, value in asked.items() if value is not None}
        )


def show(found: dict[str, Any]) -> None:
    """Draw a plan."""
    from rich.markup import escape

    from dpo_service.cli.output import duration, out

    plan = found["plan"]
    devices = f"{plan['workers']} x {plan['gpu']}"
    out.print(
        f"[bold]{escape(found['model'])}[/bold], {_count(plan['parameters'])} parameters, "
        f"{_count(plan['trained_parameters'])} trained, on {devices} ({plan['strategy']})",
        soft_wrap=True,
    )
    out.print(_parts(plan))
    out.print(_verdict(plan), soft_wrap=True)
    out.print(
        f"A step takes {plan['step_seconds']:.3g} s for {plan['tokens_a_step']:,.0f} tokens, bound by {plan['bound']} "
        f"({plan['utilisation']:.0%} of the device's rate, {plan['communication_share']:.0%} waiting for others). "
        f"{plan['steps']:,} steps and {duration(plan['reference_seconds'])} for the reference: "
        f"[bold]{duration(plan['total_seconds'])}[/bold]"
        + (f", {plan['gpu_hours']:.2f} GPU-hours" if plan["gpu"] != "cpu" else ""),
        soft_wrap=True,
    )
    if plan["better"]:
        out.print(
            f"Best left-open numbers for this device: {escape(plan['better']['text'])} "
            f"({plan['better']['step_seconds']:.3g} s a step, {_gib(plan['better']['bytes'])})",
            soft_wrap=True,
        )
    for fix in plan["fixes"]:
        out.print(f"  it fits if you {escape(fix['text'])}: {_gib(fix['bytes'])}", soft_wrap=True)
    if plan["elsewhere"]:
        out.print(_elsewhere(plan))
    for note in plan["notes"]:
        out.print(escape(note), soft_wrap=True)


def _parts(plan: dict[str, Any]) -> Table:
    from dpo_service.cli.output import table

    whole = max(plan["bytes"], plan["limit"] or 0)
    rows = [
        (part["name"], _gib(part["bytes"]), "█" * max(1, round(part["bytes"] / whole * BAR)))
        for part in sorted(plan["parts"], key=lambda part: -part["bytes"])
    ]
    return table((f"memory ({plan['peak']})", "a device", ""), [*rows, ("together", _gib(plan["bytes"]), "")])


def _verdict(plan: dict[str, Any]) -> str:
    budget, largest = plan["micro_batch_tokens"], plan["largest_micro_batch"]
    batch = f"micro-batches of up to {budget:,} tokens (the largest has {largest:,})"
    if not plan["limit"]:
        return f"{batch}; what the device has is not known"
    if plan["fits"]:
        return f"[green]fits[/green] in {_gib(plan['limit'])} with {batch}"
    help_ = "" if plan["fixes"] else "; nothing that was tried makes it fit"
    return f"[red]does not fit[/red] in {_gib(plan['limit'])} with {batch}{help_}"


def _elsewhere(plan: dict[str, Any]) -> Table:
    from dpo_service.cli.output import duration, table

    rows = [
        (other["gpu"], "yes" if other["fits"] else "no", duration(other["total_seconds"]), f"{other['gpu_hours']:.2f}")
        for other in plan["elsewhere"]
    ]
    return table(("as many of", "fits", "time", "GPU-hours"), rows)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
