"""Which rows train and which validate, and the Parquet files they lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_service.data.encoding import ENCODED, TEXTS, EncodedFile
from dpo_service.manifests.dataset import ANSWERS, SplitManifest
from dpo_service.rows.facts import Facts
from dpo_service.rows.holdout import Mask
from dpo_service.rows.mismatch import mismatched_rows

ROWS_PER_FILE = 20_000


def write_split(name: str, source: EncodedFile, members: Mask, directory: Path, key: str) -> SplitManifest:
    """Write the rows of `source` that `members` names, in order, as Parquet files under `directory`.

    `key` is the storage key that the directory will have once it is published.
    """
    names = ["prompt", *ANSWERS[source.found.rows]]
    files, rows, tokens = [], 0, 0
    digest = hashlib.sha256()
    labelled = bool(np.isfinite(source.facts["label"][members]).any())
    for number, table in enumerate(_chunks(source, members, names, labelled)):
        table = table.add_column(0, "index", pa.array(np.arange(rows, rows + len(table), dtype=np.int64)))
        _update(digest, table, names)
        path = directory / f"{name}-{number:05d}.parquet"
        pq.write_table(table, path)
        files.append(f"{key}/{path.name}")
        rows += len(table)
        tokens += sum(len(table[column].combine_chunks().flatten()) for column in names)
    return SplitManifest(name=name, files=tuple(files), rows=rows, tokens=tokens, digest=digest.hexdigest())


def _chunks(source: EncodedFile, members: Mask, names: Sequence[str], labelled: bool) -> Iterator[pa.Table]:
    """The member rows in tables of `ROWS_PER_FILE` (the last is smaller)."""
    waiting: list[pa.Table] = []
    start = 0
    with pq.ParquetFile(source.path) as file:
        for batch in file.iter_batches(batch_size=ROWS_PER_FILE):
            part = slice(start, start + len(batch))
            start += len(batch)
            waiting.append(_select(pa.table(batch), source.facts[part], members[part], names, labelled))
            while sum(map(len, waiting)) >= ROWS_PER_FILE:
                together = pa.concat_tables(waiting)
                yield together.slice(0, ROWS_PER_FILE)
                waiting = [together.slice(ROWS_PER_FILE)]
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting)


def _select(table: pa.Table, facts: Facts, members: Mask, names: Sequence[str], labelled: bool) -> pa.Table:
    columns = ["prompt", "first", "second"][: len(names)]
    texts = [name for name in TEXTS.names if name in table.column_names]
    table = table.select([*columns, *texts]).rename_columns([*names, *texts]).filter(pa.array(members))
    facts = facts[members]
    truncated = facts["prompt_cut"] | facts["answer_cut"]
    table = table.append_column("truncated", pa.array(truncated)).append_column("line", pa.array(facts["line"]))
    # A pair without a judged probability has a verdict: its chosen answer wins.
    return table.append_column("label", pa.array(np.nan_to_num(facts["label"], nan=1.0))) if labelled else table


def with_mismatched(source: EncodedFile, members: Mask, seed: int, max_length: int, target: Path) -> EncodedFile:
    """`source` with a second answer for each of `members`, that of another of them with another prompt; `target` is the
    new file. It loses its end where it does not fit beside the prompt.

    Raises:
        InvalidData: the members have one prompt only.
    """
    table = pq.read_table(source.path)
    places = np.flatnonzero(members)
    others = np.full(len(table), -1)
    others[places] = places[mismatched_rows(source.facts["prompt"][places], seed)]
    taken = table["first"].take(pa.array(others, mask=others < 0)).combine_chunks()
    room = max_length - table["prompt"].combine_chunks().value_lengths().to_numpy()
    lengths = np.minimum(taken.value_lengths().fill_null(0).to_numpy(), room)
    starts = taken.offsets.to_numpy()[:-1]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    kept = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    second = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), taken.values.take(pa.array(kept)))
    pq.write_table(table.set_column(2, "second", second.cast(ENCODED.field("second").type)), target)
    return EncodedFile(source.found, target, source.facts)


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
