"""`dpo samples`: what a job's policy answered, what the judge said of it, and what was trained on."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

import typer

from dpo_service.cli.client import Json, Service, job_path
from dpo_service.cli.cmd_jobs import JobId
from dpo_service.cli.context import ApiKey, AsJson, DataDir, Url, connect

SHOWN = 400
"""Characters of a text, unless all of it is asked for."""
PAGE = 100


def register(app: typer.Typer) -> None:
    app.command("samples")(samples)


def samples(
    job_id: JobId,
    step: Annotated[int | None, typer.Option(min=1, help="Only what was made for this step, from 1.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many prompts, of the newest steps first.")] = 5,
    full: Annotated[bool, typer.Option("--full", help="Show whole texts, and what the judge replied.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show prompts with their sampled answers, scores, verdicts and pairs; --json: a line a prompt."""
    from dpo_service.cli.output import out, print_json

    service = connect(url, api_key, data_dir)
    asked = {"limit": min(limit, PAGE)} | ({"step": step} if step is not None else {})
    found = 0
    for sample in islice(service.pages(f"{job_path(job_id)}/samples", **asked), limit):
        found += 1
        if as_json:
            print_json(sample)
        else:
            show(sample, full=full)
    if not found and not as_json:
        out.print(_why_none(service, job_id, step), soft_wrap=True)


def _why_none(service: Service, job_id: str, step: int | None) -> str:
    method = str((service.get(job_path(job_id)).get("method") or {}).get("type", ""))
    from dpo_service.specs.method import METHODS

    if method in METHODS and METHODS[method].pairs == "dataset":
        return f"The job samples nothing: method {method} trains on the answers of its file."
    return "The job has sampled nothing yet." if step is None else f"The job has sampled nothing for step {step}."


def show(sample: Json, *, full: bool) -> None:
    """One prompt and all that became of it."""
    from rich.markup import escape

    from dpo_service.cli.output import out, table

    judge = f", judged by {sample['judge']}" if sample["judge"] else ""
    out.print(f"[bold]step {sample['step']}, prompt {sample['prompt_index']}[/bold]{escape(judge)}")
    out.print(escape(_cut(_prompt(sample["prompt"]), full)), style="dim")
    rows = [_row(place, answer, sample, full=full) for place, answer in enumerate(sample["answers"])]
    out.print(table(("", "", "score", "version", "end", "answer"), rows))
    for one in sample["comparisons"]:
        out.print(f"  {one['first']} against {one['second']}: {_verdict(one)}")
    if full:
        for reply in sample["replies"]:
            out.print(f"  the judge: {escape(reply)}", style="dim")
    if sample["dropped"]:
        out.print(f"  [yellow]no pair:[/yellow] {escape(str(sample['dropped']).replace('_', ' '))}")
    for pair in sample["pairs"]:
        out.print(f"  pair: {_named(pair['chosen'])} over {_named(pair['rejected'])}")
    out.print()


def _row(place: int, answer: Json, sample: Json, *, full: bool) -> tuple[str, ...]:
    from rich.markup import escape

    score = escape(str(answer["missing"] or "")) if answer["score"] is None else f"{answer['score']:.3g}"
    end = "finished" if answer["finished"] else "cut off"
    return str(place), _mark(place, sample), score, str(answer["version"]), end, escape(_cut(answer["text"], full))


def _mark(place: int, sample: Json) -> str:
    if any(pair["chosen"] == place for pair in sample["pairs"]):
        return "[green]chosen[/green]"
    return "[red]rejected[/red]" if any(pair["rejected"] == place for pair in sample["pairs"]) else ""


def _verdict(one: Json) -> str:
    """What was chosen in both orders, by place."""
    places = {"first": str(one["first"]), "second": str(one["second"]), "tie": "a tie", None: "no reply"}
    shown = one["first_shown_first"], one["second_shown_first"]
    said = f"{places[shown[0]]}, and {places[shown[1]]} the other way round"
    return f"{said} ({one['missing']})" if one["missing"] else said


def _named(place: int) -> str:
    return "the file's answer" if place < 0 else str(place)


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _cut(text: str, full: bool) -> str:
    return text if full or len(text) <= SHOWN else text[:SHOWN] + " ..."
