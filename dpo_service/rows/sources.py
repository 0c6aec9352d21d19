"""The rows of an uploaded file, with the line each begins on: JSON Lines, one JSON array, Parquet, gzip of any of them.

What a file is, is read from its first bytes, never from its name alone. JSON Lines and Parquet are streamed; a JSON
array is held as text (at most `MAX_ARRAY_BYTES`) and decoded row by row.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_service.errors import InvalidData

Json = dict[str, Any]
MAX_ROW_BYTES = 64 << 20
MAX_ARRAY_BYTES = 1 << 30
ACCEPTED = "upload JSON Lines (one object a line), a JSON array of objects, Parquet, or gzip of one of them"
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
}
_BOM = b"\xef\xbb\xbf"


def read_rows(path: Path, name: str) -> Iterator[tuple[int, Json]]:
    """Every row of the file with its line, counted from 1 (in Parquet: the number of the row).

    Raises:
        InvalidData: the file is empty, no text, damaged, or not JSON; says on which line.
    """
    for line, raw in _entries(path, name):
        yield line, parse_row(raw, line) if isinstance(raw, bytes) else raw


def raw_rows(path: Path, name: str) -> Iterator[tuple[int, bytes]]:
    """Like `read_rows`, but each row as JSON text, so that parsing can be done elsewhere (`parse_row`)."""
    for line, raw in _entries(path, name):
        yield line, raw if isinstance(raw, bytes) else orjson.dumps(raw, default=str)


def parse_row(raw: bytes, line: int) -> Json:
    """One JSON object.

    Raises:
        InvalidData: it is not JSON, or not an object.
    """
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidData(
            f"this is not JSON: {error.msg} at column {error.colno}; each line must be one complete JSON object",
            line=line,
        ) from None
    return _require_object(row, line)


def _require_object(row: object, line: int) -> Json:
    if not isinstance(row, dict):
        kind = {list: "an array", str: "a string", type(None): "null"}.get(type(row), "a number or truth value")
        raise InvalidData(f"expected a JSON object with named columns, found {kind}", line=line)
    return row


def _entries(path: Path, name: str) -> Iterator[tuple[int, bytes | Json]]:
    """Rows as JSON text (JSON Lines) or already decoded (JSON array, Parquet)."""
    rows = 0
    try:
        for entry in _entries_of_kind(path, name):
            rows += 1
            yield entry
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidData(f"{name!r} is damaged gzip ({error}); compress and upload it again") from None
    if rows == 0:
        raise InvalidData(f"{name!r} holds no rows; {ACCEPTED}")


def _entries_of_kind(path: Path, name: str) -> Iterator[tuple[int, bytes | Json]]:
    with path.open("rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        # A gzip member's bytes never start a Parquet file or JSON, so the magic number decides, not the name.
        stream: BinaryIO = gzip.open(plain, "rb") if zipped else plain  # type: ignore[assignment]  # noqa: SIM115
        head = stream.read(4096)
        stream.seek(0)
        if head[:4] == b"PAR1":
            yield from _parquet(stream, name)
        elif _first_character(head, name) == b"[":
            yield from _array(stream, name)
        else:
            yield from _lines(stream, name)


def _first_character(head: bytes, name: str) -> bytes:
    """The first character that is no space, after a look whether this is text at all."""
    if not head:
        raise InvalidData(f"{name!r} is empty; {ACCEPTED}")
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            raise InvalidData(f"{name!r} is {kind}; {ACCEPTED}")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InvalidData(f"{name!r} is UTF-16 text; save it as UTF-8")
    if b"\0" in head:
        raise InvalidData(f"{name!r} is no text (it holds NUL bytes); {ACCEPTED}")
    return head.removeprefix(_BOM).lstrip()[:1]


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    line = 0
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(raw) > MAX_ROW_BYTES:
            raise InvalidData(f"the line is longer than {MAX_ROW_BYTES:,} bytes; put one row on each line", line=line)
        raw = (raw.removeprefix(_BOM) if line == 1 else raw).strip()
        if raw:
            _require_text(raw, line, name)
            yield line, raw


def _require_text(raw: bytes, line: int, name: str) -> None:
    if b"\0" in raw:
        raise InvalidData(f"{name!r} is no text (a NUL byte here); {ACCEPTED}", line=line)
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidData(
            f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8", line=line
        ) from None


def _array(stream: BinaryIO, name: str) -> Iterator[tuple[int, Json]]:
    """The elements of one JSON array, each with the line it begins on."""
    data = stream.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        raise InvalidData(f"{name!r} is a JSON array of over {MAX_ARRAY_BYTES:,} bytes; convert it to JSON Lines")
    try:
        text = data.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidData(f"{name!r} is not UTF-8 text; save it as UTF-8", line=line) from None
    del data
    try:
        yield from _elements(text)
    except json.JSONDecodeError as error:
        raise InvalidData(f"this is not JSON: {error.msg} at column {error.colno}", line=error.lineno) from None
    except RecursionError:
        raise InvalidData(f"{name!r} is nested too deeply to be a list of rows") from None


def _elements(text: str) -> Iterator[tuple[int, Json]]:
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = _skip_space(text, text.index("[") + 1)
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        _, end = decoder.raw_decode(text, position)
        # Decoded by the same parser as JSON Lines, which also refuses NaN and halves of surrogate pairs.
        yield line, parse_row(text[position:end].encode(), line)
        position = _skip_space(text, end)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            raise json.JSONDecodeError("expected ',' or ']'", text, position)
    if text[position + 1 :].strip():
        raise json.JSONDecodeError("text after the end of the array", text, position + 1)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _parquet(stream: BinaryIO, name: str) -> Iterator[tuple[int, Json]]:
    # Parquet is read from its end, so a gzipped one must be unpacked whole.
    source = io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream
    row = 0
    try:
        for batch in pq.ParquetFile(source).iter_batches(batch_size=1000):
            for values in batch.to_pylist():
                row += 1
                yield row, {column: value for column, value in values.items() if value is not None}
    except (pa.ArrowException, OSError) as error:
        raise InvalidData(f"{name!r} is a damaged Parquet file ({error}); write and upload it again") from None
