"""`dpo data check`: what the service would say of a file, without the service."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_service.cli.context import AsJson
from dpo_service.cli.exits import CliError, ExitCode

if TYPE_CHECKING:
    from rich.table import Table

    from dpo_service.manifests.dataset import DatasetReport, LengthStats
    from dpo_service.rows.template import Tokenizer

BAR = 40


class TooLong(StrEnum):
    """What becomes of an answer that is too long."""

    REFUSE = "refuse"
    CUT = "cut"
    DROP = "drop"


def register(app: typer.Typer) -> None:
    data = typer.Typer(help="Look at files of training rows.", no_args_is_help=True)
    data.command("check")(check)
    app.add_typer(data, name="data")


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON, JSONL or Parquet, or gzip of either.")],
    model: Annotated[
        str | None, typer.Option(help="Count tokens as this model does: a directory, or a hub id.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens of prompt plus answer. [default: the model's, at most 1024]")
    ] = None,
    truncation: Annotated[TooLong, typer.Option(help="What becomes of an answer that is too long.")] = TooLong.REFUSE,
    as_json: AsJson = False,
) -> None:
    """Check a file of training rows and report on it. Nothing is sent anywhere. Exit code 3: it is refused."""
    from dpo_service.errors import UserError
    from dpo_service.rows.check import check_file

    if not file.is_file():
        raise CliError(f"there is no file {file}", ExitCode.USAGE)
    tokenizer, allowed = _of_model(model) if model else (None, None)
    try:
        report = check_file(
            file,
            file.name,
            tokenizer=tokenizer,
            max_length=max_length or allowed,
            truncation=truncation.value,
            full=True,
        )
    except UserError as error:
        raise CliError(f"{file}: {error.message}", ExitCode.REFUSED) from None
    if as_json:
        from dpo_service.cli.output import print_json

        print_json(report.model_dump())
    else:
        show_report(report, str(file))


def _of_model(model: str) -> tuple[Tokenizer, int]:
    """Of a local model directory, or of a hub id (its small files are fetched), the tokenizer, and the `max_length` of
    a job that names none.

    Raises:
        CliError: there is no such model, or the hub does not answer.
    """
    from dpo_service.errors import DpoServiceError
    from dpo_service.jobs.choices import DEFAULT_MAX_LENGTH
    from dpo_service.registry.directories import inspect
    from dpo_service.rows.template import Tokenizer

    directory = Path(model) if Path(model).is_dir() else _fetch_tokenizer(model)
    try:
        allowed = inspect(directory, model, weights_here=False).max_length
        return Tokenizer.load(directory), min(allowed, DEFAULT_MAX_LENGTH)
    except DpoServiceError as error:
        raise CliError(f"--model {model}: {error.message}", ExitCode.USAGE) from None


def _fetch_tokenizer(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.jinja", "*.model"]))
    except Exception as error:
        # The hub's client has a dozen exceptions for this, some of them the HTTP library's.
        raise CliError(
            f"--model {model}: it is no local directory, and the hub did not give it ({type(error).__name__})",
            ExitCode.USAGE,
        ) from None


def show_report(report: DatasetReport, title: str) -> None:
    """Draw a dataset report as tables."""
    from rich.markup import escape

    from dpo_service.cli.output import out, table

    out.print(
        f"[bold]{escape(title)}[/bold]: {escape(report.format)}, {report.rows:,} rows, {report.kept:,} to train on"
    )
    if report.dropped:
        rows = [
            (drop.reason.replace("_", " "), f"{drop.count:,}", str(drop.first_line or "")) for drop in report.dropped
        ]
        out.print(table(("left out", "rows", "first line"), rows))
    facts = _facts(report)
    if facts:
        out.print(table(("found", "rows"), facts))
    lengths = _lengths(report)
    if lengths is not None:
        out.print(lengths)
    for warning in report.warnings:
        out.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)


def _facts(report: DatasetReport) -> list[tuple[str, str]]:
    unpaired = report.desirable is not None
    contradictions = "answers with both labels" if unpaired else "pairs whose reverse is in the file too"
    counts = {
        "prompts that lose their beginning": report.truncated_prompts,
        "answers cut at the end": report.truncated_answers,
        "desirable answers": report.desirable or 0,
        "undesirable answers": report.undesirable or 0,
        "prompts with a reference answer": report.references or 0,
        contradictions: report.contradictions,
        "ties": report.ties,
    }
    facts = [(name, f"{count:,}") for name, count in counts.items() if count]
    if report.longer_chosen_share is not None:
        facts.append(("share of pairs whose chosen answer is the longer one", f"{report.longer_chosen_share:.0%}"))
    return facts


def _lengths(report: DatasetReport) -> Table | None:
    """Token counts, a bar each: dark up to the median, lighter up to 95% of the rows, light up to the longest."""
    from dpo_service.cli.output import table

    stats: dict[str, LengthStats | None] = {
        "prompt": report.prompt_tokens,
        "chosen": report.chosen_tokens,
        "rejected": report.rejected_tokens,
        "answer": report.answer_tokens,
    }
    known = {name: value for name, value in stats.items() if value is not None}
    if not known:
        return None
    longest = max(value.max for value in known.values()) or 1
    rows = [
        (name, f"{value.mean:.0f}", str(value.p50), str(value.p95), str(value.max), length_bar(value, longest))
        for name, value in known.items()
    ]
    return table(("tokens", "mean", "median", "95%", "longest", "█ half ▓ 95% ░ all"), rows)


def length_bar(stats: LengthStats, longest: int) -> str:
    half, most, whole = (round(value / longest * BAR) for value in (stats.p50, stats.p95, stats.max))
    return "█" * half + "▓" * (most - half) + "░" * (whole - most)
