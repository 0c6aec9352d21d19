"""`dpo up` and `dpo down`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from dpo_service.cli.client import default_data_dir
from dpo_service.cli.context import AsJson, DataDir
from dpo_service.cli.exits import CliError, ExitCode


def register(app: typer.Typer) -> None:
    app.command("up")(up)
    app.command("down")(down)


def up(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; off loopback, DPO_API_KEYS is needed.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the REST API. [default: 8000]")] = None,
    data_dir: DataDir = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Start in the background; return when ready.")] = False,
    as_json: AsJson = False,
) -> int:
    """Start the service: REST API, job reconciler and, unless there is a cluster already, Ray on this machine.

    One line is printed when it is ready. Settings are environment variables (DPO_HOST, DPO_PORT, DPO_DATA_DIR,
    DPO_API_KEYS, DPO_CLUSTER, ...); the options here come first. Exit code 5: another `dpo up` holds the directory.
    """
    from pydantic import ValidationError

    from dpo_service.settings import Settings

    given: dict[str, Any] = {"host": host, "port": port, "data_dir": data_dir}
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise CliError(_first_problem(error), ExitCode.USAGE) from None
    from dpo_service import main

    # With --json, stdout is for the one object; the ready line of a service in the foreground is for people.
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        code = main.up(settings, detach=detach)
    if as_json and detach and code == 0:
        _print_service(settings.data_dir)
    return code


def down(data_dir: DataDir = None, as_json: AsJson = False) -> int:
    """Stop the service of a data directory, with its jobs, its served models and its Ray.

    What was trained, and the history of the jobs, stays in the data directory.
    """
    from dpo_service import main

    directory = data_dir or default_data_dir()
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        code = main.down(directory)
    if as_json:
        from dpo_service.cli.output import print_json

        print_json({"data_dir": str(directory), "stopped": code == 0})
    return code


def _first_problem(error: Any) -> str:
    """The first of pydantic's errors, as a sentence that names the setting."""
    problem = error.errors()[0]
    name = "DPO_" + "_".join(str(part) for part in problem["loc"][:1]).upper() if problem["loc"] else "the settings"
    return f"{name}: {str(problem['msg']).removeprefix('Value error, ')}"


def _print_service(data_dir: Any) -> None:
    import json

    from dpo_service.cli.client import SERVICE_FILE
    from dpo_service.cli.output import print_json

    print_json(json.loads((data_dir / SERVICE_FILE).read_text()))
