"""Which rows train and which validate, and the Parquet files they lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_service.data.encoding import EncodedFile
from dpo_service.manifests.dataset import SplitManifest
from dpo_service.rows.facts import Facts
from dpo_service.rows.holdout import Mask

ROWS_PER_FILE = 20_000


def write_split(name: str, source: EncodedFile, members: Mask, directory: Path, key: str) -> SplitManifest:
    """Write the rows of `source` that `members` names, in order, as Parquet files under `directory`.

    `key` is the storage key that the directory will have once it is published.
    """
    names = ["prompt", "chosen", "rejected"] if source.found.rows == "pairs" else ["prompt", "answer"]
    files, rows, tokens = [], 0, 0
    digest = hashlib.sha256()
    for number, table in enumerate(_chunks(source, members, names)):
        table = table.add_column(0, "index", pa.array(np.arange(rows, rows + len(table), dtype=np.int64)))
        _update(digest, table, names)
        path = directory / f"{name}-{number:05d}.parquet"
        pq.write_table(table, path)
        files.append(f"{key}/{path.name}")
        rows += len(table)
        tokens += sum(len(table[column].combine_chunks().flatten()) for column in names)
    return SplitManifest(name=name, files=tuple(files), rows=rows, tokens=tokens, digest=digest.hexdigest())


def _chunks(source: EncodedFile, members: Mask, names: Sequence[str]) -> Iterator[pa.Table]:
    """The member rows in tables of `ROWS_PER_FILE` (the last is smaller)."""
    waiting: list[pa.Table] = []
    start = 0
    with pq.ParquetFile(source.path) as file:
        for batch in file.iter_batches(batch_size=ROWS_PER_FILE):
            part = slice(start, start + len(batch))
            start += len(batch)
            waiting.append(_select(pa.table(batch), source.facts[part], members[part], names))
            while sum(map(len, waiting)) >= ROWS_PER_FILE:
                together = pa.concat_tables(waiting)
                yield together.slice(0, ROWS_PER_FILE)
                waiting = [together.slice(ROWS_PER_FILE)]
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting)


def _select(table: pa.Table, facts: Facts, members: Mask, names: Sequence[str]) -> pa.Table:
    columns = ["prompt", "first", "second"][: len(names)]
    table = table.select(columns).rename_columns(list(names)).filter(pa.array(members))
    facts = facts[members]
    truncated = facts["prompt_cut"] | facts["answer_cut"]
    return table.append_column("truncated", pa.array(truncated)).append_column("line", pa.array(facts["line"]))


def split_digest(files: Sequence[Path], names: Sequence[str]) -> str:
    """sha256 over the token ids of the files' rows, in order: a `SplitManifest.digest`."""
    digest = hashlib.sha256()
    for path in files:
        _update(digest, pq.read_table(path, columns=list(names)), names)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, table: pa.Table, names: Sequence[str]) -> None:
    """Lengths and ids row by row, so that the digest does not depend on how rows are spread over files."""
    columns = []
    for name in names:
        values = table[name].combine_chunks()
        flat = np.ascontiguousarray(values.flatten().to_numpy(), np.int32)
        columns.append((flat, np.concatenate([[0], np.cumsum(values.value_lengths().to_numpy())])))
    for row in range(len(table)):
        for flat, offsets in columns:
            ids = flat[offsets[row] : offsets[row + 1]]
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(ids.tobytes())
