"""Which rows train and which validate, and the Parquet files they lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dpo_service.data.encoding import EncodedFile
from dpo_service.errors import InvalidData
from dpo_service.manifests.dataset import SplitManifest
from dpo_service.rows.facts import Facts

ROWS_PER_FILE = 20_000
Mask = NDArray[np.bool_]


def hold_out(facts: Facts, share: float, seed: int) -> Mask:
    """The rows that validate: all rows of about `share` of the prompts, picked by a hash of prompt and seed.

    So the same prompt never lies on both sides; each side gets one prompt at least. Rows that are left out are in
    neither.

    Raises:
        InvalidData: all rows have the same prompt.
    """
    kept = facts["reason"] == 0
    prompts = np.unique(facts["prompt"][kept])
    if len(prompts) < 2:
        raise InvalidData(
            "all rows have the same prompt, so none can be held out; upload a validation_file or set eval.split to 0"
        )
    count = min(max(round(share * len(prompts)), 1), len(prompts) - 1)
    held = prompts[np.argsort(_mix(prompts, seed), kind="stable")[:count]]
    chosen: Mask = kept & np.isin(facts["prompt"], held)
    return chosen


def _mix(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """splitmix64 (Steele et al., OOPSLA 2014) of each value and the seed."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


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
