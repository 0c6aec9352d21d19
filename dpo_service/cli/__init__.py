"""The `dpo` command. Nothing heavy is imported before a command needs it, so that `dpo --help` is quick."""

from __future__ import annotations


def main() -> None:
    """Entry point of the console script: runs the command and exits with one of `cli.exits.ExitCode`."""
    from dpo_service.cli.app import run

    raise SystemExit(run())
