"""The options every command shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo_service.cli.client import Service, find_url

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
    return Service(find_url(url, data_dir), api_key)
