"""The user's own preference file, divided into rows to train on and rows held out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_service.cli.exits import CliError, ExitCode
from dpo_service.demo.corpus import write_jsonl
from dpo_service.errors import UserError
from dpo_service.rows.formats import normalise, recognise
from dpo_service.rows.kinds import as_kind
from dpo_service.rows.sources import read_rows

HELD_OUT_AT_MOST = 32
HELD_OUT_SHARE = 20
"""One row in so many is held out."""
QUESTIONS = 3
UNLIMITED = 1 << 20

Message = dict[str, Any]


@dataclass(frozen=True)
class OwnData:
    training: Path
    held_out: Path
    rows: int
    held_out_rows: int
    questions: list[list[Message]]
    """Held-out prompts to ask both models."""


def divide(file: Path, folder: Path) -> OwnData:
    """Write the rows of `file` to two files in `folder`, every twentieth (at most 32) to the held-out one.

    Raises:
        CliError: the file has no preference pairs, or too few.
    """
    try:
        rows = list(read_rows(file, file.name))
        found = recognise(rows[0][1], rows[0][0])
        as_kind(found, "pairs")
        held_out = _every(rows)
        questions = [_as_messages(normalise(row, line, found).prompt) for line, row in held_out[:QUESTIONS]]
    except OSError as error:
        raise CliError(f"cannot read {file}: {error.strerror}", ExitCode.USAGE) from None
    except UserError as error:
        raise CliError(f"{file}: {error.message}", ExitCode.REFUSED) from None
    lines = {line for line, _ in held_out}
    training, kept_out = folder / "own-training.jsonl", folder / "own-held-out.jsonl"
    write_jsonl(training, (row for line, row in rows if line not in lines))
    write_jsonl(kept_out, (row for _, row in held_out))
    return OwnData(training, kept_out, len(rows) - len(held_out), len(held_out), questions)


def context_of(model: Path | None) -> int:
    """Tokens a local model can attend to; a large number where its configuration does not say."""
    try:
        config = json.loads((model / "config.json").read_text()) if model else {}
    except (OSError, ValueError):
        config = {}
    return int(config.get("max_position_embeddings") or UNLIMITED)


def _every(rows: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    count = min(HELD_OUT_AT_MOST, max(2, len(rows) // HELD_OUT_SHARE))
    if len(rows) < 4:
        raise CliError(f"{len(rows)} rows are too few to train on some and hold out others", ExitCode.REFUSED)
    return rows[:: len(rows) // count][:count]


def _as_messages(prompt: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
