"""Some of a training file's rows, for a look at the model before all of them are read: the first, the longest that are
not too long, and random ones."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import orjson

from dpo_service.errors import InvalidData
from dpo_service.manifests.inspection import SampleRow
from dpo_service.rows.formats import recognise
from dpo_service.rows.kinds import as_kind, rows_of
from dpo_service.rows.row import Json, Row, Text
from dpo_service.rows.sources import read_rows
from dpo_service.specs.method import RowKind

FIRST, LONGEST, RANDOM = 4, 4, 16
READ_ROWS, READ_S = 20_000, 1.5
"""The file is read so far."""
ROW_BYTES, ALL_BYTES = 64 << 10, 256 << 10
"""Of one row and of all of them, at most."""

_Entry = tuple[int, int, Json]
"""Bytes, line, row."""


def sample_rows(path: Path, name: str, rows: RowKind) -> tuple[SampleRow, ...]:
    """Rows of the file, as the method reads them. Takes two seconds at most; a JSON array is read whole.

    A row that cannot be read ends the reading and is no error here: the check of all rows reports it.
    """
    chosen = _choose(_readable(path, name))
    try:
        found = as_kind(recognise(chosen[0][2], chosen[0][1]), rows) if chosen else None
        read = [row for _, line, raw in chosen for row in rows_of(raw, line, found)] if found else []
        return tuple(map(_sample, read))
    except InvalidData:
        return ()


def _readable(path: Path, name: str) -> Iterator[_Entry]:
    deadline = time.monotonic() + READ_S
    try:
        for line, raw in islice(read_rows(path, name), READ_ROWS):
            size = _size(raw)
            if size is not None and size <= ROW_BYTES:
                yield size, line, raw
            if time.monotonic() > deadline:
                return
    except (InvalidData, OSError):
        return


def _size(raw: Json) -> int | None:
    """Bytes of the row; None where it is nothing that can be passed on as JSON."""
    try:
        return len(orjson.dumps(raw, default=str))
    except TypeError:
        return None


def _choose(entries: Iterator[_Entry]) -> list[_Entry]:
    """In the order of the file."""
    first: list[_Entry] = []
    longest: list[tuple[int, int, _Entry]] = []
    drawn: list[_Entry] = []
    draw = random.Random(0)
    for number, entry in enumerate(entries):
        if number < FIRST:
            first.append(entry)
        heapq.heappush(longest, (entry[0], -entry[1], entry))
        if len(longest) > LONGEST:
            heapq.heappop(longest)
        if len(drawn) < RANDOM:
            drawn.append(entry)
        elif (place := draw.randrange(number + 1)) < RANDOM:
            drawn[place] = entry
    by_line: dict[int, _Entry] = {}
    room = ALL_BYTES
    for entry in [*first[:1], *(held[2] for held in longest), *first, *drawn]:
        if entry[1] not in by_line and entry[0] <= room:
            by_line[entry[1]] = entry
            room -= entry[0]
    return [by_line[line] for line in sorted(by_line)]


def _sample(row: Row) -> SampleRow:
    return SampleRow.model_validate_json(
        orjson.dumps(
            {
                "line": row.line,
                "texts": _continued(row.plain[0], row.plain[1:]) if row.plain else _texts(row),
                "conversations": _conversations(row),
                "tools": row.tools,
            },
            default=str,
        )
    )


def _texts(row: Row) -> list[str]:
    return _continued(row.prompt, row.answers) if isinstance(row.prompt, str) else []


def _continued(prompt: str, answers: tuple[Text, ...]) -> list[str]:
    return [prompt, *(prompt + str(answer) for answer in answers)]


def _conversations(row: Row) -> list[list[Json]]:
    if isinstance(row.prompt, str):
        return []
    return [row.prompt, *([*row.prompt, *answer] for answer in row.answers if not isinstance(answer, str))]
