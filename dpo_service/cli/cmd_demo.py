"""`dpo demo`: from nothing to a served, preference-tuned model. `dpo demo-online`: a model that learns from itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo_service.cli.context import AsJson


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)
    app.command("demo-online")(demo_online)


DemoDir = Annotated[Path, typer.Option("--data-dir", help="Where everything is kept.")]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the service. [default: 8000, or a free one]")]


def demo(
    model: Annotated[str | None, typer.Option(help="Your own model: a local directory, or a hub id.")] = None,
    data: Annotated[Path | None, typer.Option(help="Your own preference file; goes with --model.")] = None,
    data_dir: DemoDir = Path("data"),
    port: Port = None,
    as_json: AsJson = False,
) -> int:
    """From nothing to a served, preference-tuned model, through the public REST API alone; minutes on two cores.

    Without options it makes a small base model and preferences of its own. With --model and --data it tunes your model
    on your file.
    """
    from dpo_service.demo.story import run

    return run(data_dir=data_dir, port=port, model=model, data=data, as_json=as_json)


def demo_online(data_dir: DemoDir = Path("data"), port: Port = None, as_json: AsJson = False) -> int:
    """Online DPO on a small model: it answers, rules judge, it is trained on what it said; minutes on two cores."""
    from dpo_service.demo.online import run

    return run(data_dir=data_dir, port=port, as_json=as_json)
