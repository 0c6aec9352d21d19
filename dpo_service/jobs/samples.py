"""What a job sampled and what was said of it, read back from storage (online/samples.py writes it)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dpo_service.errors import UserError
from dpo_service.storage import paths
from dpo_service.storage.store import Store

Row = dict[str, Any]
_UNREAD = frozenset(["prompt_ids", "answer_ids"])
_NAME = re.compile(r"step-(\d{8})\.parquet")
_PLACE = re.compile(r"(\d{1,12})-(\d{1,12})")


@dataclass(frozen=True)
class Page:
    rows: tuple[Row, ...]
    has_more: bool


def read(store: Store, job_id: str, *, step: int | None, after: str | None, limit: int) -> Page:
    """At most `limit` prompts with their answers: of the newest steps, or of `step` only (from 1), after the one named.

    Raises:
        UserError: `after` names no place.
    """
    place = _place(after)
    found: list[Row] = []
    for number, path in _files(store, job_id, step):
        if place is not None and number > place[0]:
            continue
        rows = _rows(path)
        found += rows if place is None or number < place[0] else _behind(rows, place[1])
        if len(found) > limit:
            break
    return Page(tuple(found[:limit]), len(found) > limit)


def place_of(row: Row) -> str:
    """The id by which a page goes on after the row."""
    return f"{row['step']}-{row['position']}"


def _place(after: str | None) -> tuple[int, int] | None:
    if after is None:
        return None
    match = _PLACE.fullmatch(after)
    if match is None:
        raise UserError(f"after {after!r} is no id of a sample; give one as the list has it", param="after")
    return int(match[1]), int(match[2])


def _behind(rows: list[Row], position: int) -> list[Row]:
    return [row for row in rows if row["position"] > position]


def _files(store: Store, job_id: str, step: int | None) -> Iterator[tuple[int, Path]]:
    named = ((_NAME.fullmatch(path.name), path) for path in store.path(paths.samples_dir(job_id)).glob("step-*"))
    steps = {int(match[1]): path for match, path in named if match is not None}
    for number in sorted(steps, reverse=True):
        if step is None or number == step:
            yield number, steps[number]


def _rows(path: Path) -> list[Row]:
    """By position."""
    file = pq.ParquetFile(path)
    columns = [name for name in file.schema_arrow.names if name not in _UNREAD]
    rows: list[Row] = file.read(columns=columns).to_pylist()
    return sorted(rows, key=lambda row: int(row["position"]))
