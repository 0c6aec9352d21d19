"""A file to token ids, in shards.

    file ──spool──> raw shards (line, JSON text) ──Ray Data──> parse, check, render, tokenise ──> one Parquet file
          driver, one pass, no parsing                         one task a shard                   + facts, in memory

The driver only cuts the file into shards of about `SHARD_BYTES`: a small file is one task, a large one as many as the
cluster has room for. A bad row comes back as data, so that the first one in the file is the one reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from dpo_service.data.ray_data import quiet
from dpo_service.errors import InvalidData
from dpo_service.rows.encode import Encoded, encode
from dpo_service.rows.facts import FACTS, Facts, fact_of
from dpo_service.rows.formats import BY_NAME, Format, recognise
from dpo_service.rows.kinds import as_kind, rows_of
from dpo_service.rows.row import Row
from dpo_service.rows.sources import parse_row, raw_rows
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.data import DataSpec, Truncation
from dpo_service.specs.method import PROMPT_KINDS, RowKind

SHARD_BYTES = 4 << 20
_RAW = pa.schema([("line", pa.int64()), ("row", pa.binary())])
_TOKENS = pa.list_(pa.int32())
ENCODED = pa.schema([("prompt", _TOKENS), ("first", _TOKENS), ("second", _TOKENS)])
"""Token ids: `first` is the chosen answer, or the only one; `second` that of a pair, or of KTO's mismatched row."""
TEXTS = pa.schema([("prompt_text", pa.string()), ("reference", pa.string()), ("row", pa.string())])
"""Of prompts whose answers are sampled, for those who judge: as in `DatasetManifest`."""
_RESULT = pa.schema(
    [("facts", pa.binary(FACTS.itemsize)), ("error", pa.string()), ("error_line", pa.int64()), *ENCODED, *TEXTS]
)
Progress = Callable[[str, int, int], None]
"""Told (stage, rows done, rows in all; 0 = not known yet)."""


@dataclass(frozen=True)
class EncodedFile:
    """A file's rows as token ids: `path` holds them (`columns_of` its kind), `facts` one entry each, in file order."""

    found: Format
    path: Path
    facts: Facts


def columns_of(kind: RowKind) -> pa.Schema:
    return pa.schema([*ENCODED, *TEXTS]) if kind in PROMPT_KINDS else ENCODED


def encode_file(
    path: Path, name: str, spec: DataSpec, *, model_dir: Path, scratch: Path, progress: Progress
) -> EncodedFile:
    """Read, check and tokenise a file. Ray must be initialised; `scratch` gets the shards and the result.

    Raises:
        InvalidData: the first row that cannot be trained on.
    """
    scratch.mkdir(parents=True)
    found, shards, rows = spool(path, name, spec.rows, scratch, progress)
    target, columns = scratch / "encoded.parquet", columns_of(spec.rows)
    facts: list[Facts] = []
    done = 0
    with pq.ParquetWriter(target, columns) as writer:
        for table in _encode_shards(shards, found, spec, model_dir):
            _raise_first_error(table)
            facts.append(np.frombuffer(b"".join(table["facts"].to_pylist()), FACTS))
            writer.write_table(table.select(columns.names).cast(columns))
            done += len(table)
            progress("tokenising", done, rows)
    for shard in shards:
        shard.unlink()
    return EncodedFile(found, target, np.concatenate(facts))


def spool(path: Path, name: str, rows: RowKind, directory: Path, progress: Progress) -> tuple[Format, list[Path], int]:
    """Cut the file into raw shards; returns its format, the shards in order, and the number of rows.

    Raises:
        InvalidData: the file is no list of rows, or of a kind the method cannot use.
    """
    found: Format | None = None
    shards: list[Path] = []
    count = size = 0
    lines: list[int] = []
    texts: list[bytes] = []

    def flush() -> None:
        shards.append(directory / f"raw-{len(shards):06d}.parquet")
        pq.write_table(pa.table([lines, texts], schema=_RAW), shards[-1], compression="lz4")
        lines.clear()
        texts.clear()

    for line, text in raw_rows(path, name):
        if found is None:
            found = recognise(parse_row(text, line), line)
            found = as_kind(found, rows)
        lines.append(line)
        texts.append(text)
        count, size = count + 1, size + len(text)
        if size >= SHARD_BYTES:
            flush()
            size = 0
            progress("reading", count, 0)
    if lines:
        flush()
    progress("reading", count, count)
    assert found is not None
    return found, shards, count


def _encode_shards(shards: list[Path], found: Format, spec: DataSpec, model_dir: Path) -> Iterator[pa.Table]:
    with quiet():
        dataset = ray.data.read_parquet(
            [str(shard) for shard in shards], override_num_blocks=len(shards), num_cpus=0.5
        ).map_batches(
            encode_batch,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.5,
            fn_kwargs={
                "format_name": found.name,
                "kind": found.rows,
                "model_dir": str(model_dir),
                "max_length": spec.max_length,
                "truncation": spec.truncation,
                "answer_room": spec.answer_room,
            },
        )
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def encode_batch(
    table: pa.Table,
    *,
    format_name: str,
    kind: RowKind,
    model_dir: str,
    max_length: int,
    truncation: Truncation,
    answer_room: int = 0,
) -> pa.Table:
    """Raw rows (line, row) to facts and token ids, up to the first bad row, which is the last of the result."""
    tokenizer, expected = _tokenizer(model_dir), as_kind(BY_NAME[format_name], kind)
    facts, tokens, texts = [], [], []
    bad: InvalidData | None = None
    for line, text in zip(table["line"].to_pylist(), table["row"].to_pylist(), strict=True):
        try:
            rows = rows_of(parse_row(text, line), line, expected)
            encoded = [encode(row, tokenizer, max_length, truncation, answer_room) for row in rows]
        except InvalidData as error:
            bad = error
            break
        facts += [fact_of(row, made) for row, made in zip(rows, encoded, strict=True)]
        tokens += [[made.prompt, *made.answers] if isinstance(made, Encoded) else [] for made in encoded]
        texts += [_texts(row) if kind in PROMPT_KINDS else (None, None, None) for row in rows]
    return _result(np.array(facts, FACTS), tokens, texts, bad)


def _texts(row: Row) -> tuple[str, str | None, str]:
    return _json(row.prompt), row.reference, _json(row.columns or {})


def _json(value: object) -> str:
    return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


@lru_cache(maxsize=4)
def _tokenizer(model_dir: str) -> Tokenizer:
    """Loaded once a worker process, which Ray uses for many shards."""
    return Tokenizer.load(Path(model_dir))


def _result(
    facts: Facts,
    tokens: list[list[list[int]]],
    texts: Sequence[tuple[str | None, str | None, str | None]],
    bad: InvalidData | None,
) -> pa.Table:
    extra = 1 if bad is not None else 0
    packed = [fact.tobytes() for fact in facts] + [bytes(FACTS.itemsize)] * extra
    columns = [[row[i] if i < len(row) else [] for row in tokens] + [[]] * extra for i in range(3)]
    errors = [None] * len(facts) + ([bad.message] if bad else [])
    lines = [None] * len(facts) + ([bad.line] if bad else [])
    told = [[row[i] for row in texts] + [None] * extra for i in range(3)]
    return pa.table([packed, errors, lines, *columns, *told], schema=_RESULT)


def _raise_first_error(table: pa.Table) -> None:
    for message, line in zip(table["error"].to_pylist(), table["error_line"].to_pylist(), strict=True):
        if message is not None:
            error = InvalidData(message)  # the message already begins with the line
            error.line = line
            raise error
