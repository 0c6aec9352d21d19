"""The options every command shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo_service.cli.client import SERVICE_FILE, Service, find_url
from dpo_service.cli.exits import CliError, ExitCode

Url = Annotated[
    str | None,
    typer.Option(
        "--url", help="Address of the service. Default: DPO_URL, else what `dpo up` left in the data directory."
    ),
]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="API key. Default: DPO_API_KEY.", show_default=False)]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", help="Data directory of the service. Default: DPO_DATA_DIR, else ~/.dpo.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON (one object a line) and nothing else to stdout.")]


def connect(url: str | None, api_key: str | None, data_dir: Path | None) -> Service:
    """The service that the options name. Raises CliError where none runs on the data directory that they name."""
    if url is None and data_dir is not None and not (data_dir / SERVICE_FILE).exists():
        raise CliError(
            f"no service runs on the data directory {data_dir}; start one with `dpo up --data-dir {data_dir}`, or name "
            "another by --data-dir or --url",
            ExitCode.UNREACHABLE,
        )
    return Service(find_url(url, data_dir), api_key)
