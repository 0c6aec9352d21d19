"""The commands by name, and how errors become exit codes."""

from __future__ import annotations

import sys

import typer

from dpo_service.cli import (
    cmd_chat,
    cmd_data,
    cmd_demo,
    cmd_doctor,
    cmd_jobs,
    cmd_models,
    cmd_plan,
    cmd_samples,
    cmd_service,
)
from dpo_service.cli.exits import MEANING, CliError, ExitCode, Refused

HELP = "Train language models on preferences, and serve them. `dpo COMMAND --help` explains a command."
EPILOG = "Exit codes: " + "; ".join(f"{int(code)} {text}" for code, text in MEANING.items()) + "."

app = typer.Typer(
    name="dpo",
    help=HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (cmd_service, cmd_jobs, cmd_samples, cmd_plan, cmd_models, cmd_chat, cmd_data, cmd_doctor, cmd_demo):
    module.register(app)


def run(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        result = app(args=arguments, standalone_mode=False, prog_name="dpo")
    except CliError as error:
        _report(error, as_json="--json" in arguments)
        return int(error.code)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        return _usage(error)
    return result if isinstance(result, int) else int(ExitCode.OK)


def _usage(error: Exception) -> int:
    """The parser's own errors have `show` and `exit_code`; an abort is an interrupt; the rest is a bug, shown."""
    if hasattr(error, "exit_code"):
        if hasattr(error, "show"):
            error.show()
        return int(error.exit_code)
    if type(error).__name__ == "Abort":
        return 130
    raise error


def _report(error: CliError, *, as_json: bool) -> None:
    from rich.markup import escape

    from dpo_service.cli.output import err, print_json

    err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
    if as_json:
        refused = (error.error_code, error.param) if isinstance(error, Refused) else (None, None)
        print_json(
            {"error": {"message": str(error), "code": refused[0], "param": refused[1], "exit_code": int(error.code)}}
        )
