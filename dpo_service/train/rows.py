"""The prepared dataset as the training side sees it: rows of token ids, addressed by index."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dpo_service.errors import TrainingError
from dpo_service.manifests.dataset import SplitManifest
from dpo_service.storage.store import Store


@dataclass(frozen=True)
class Example:
    """One row. Token ids; `rejected` is None for a supervised row, whose answer is `chosen`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None = None
    truncated: bool = False
    ref_chosen: float | None = None
    ref_rejected: float | None = None


class RowTable:
    """A split of the dataset, rows in `index` order. Columns as in `DatasetManifest`."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.paired = "rejected" in table.column_names
        self.has_reference = "ref_chosen" in table.column_names
        self._answer = "chosen" if self.paired else "answer"

    @classmethod
    def load(cls, store: Store, split: SplitManifest) -> RowTable:
        """Raises TrainingError if the files do not hold the rows the manifest says."""
        tables = [pq.read_table(store.path(key), memory_map=True) for key in split.files]
        table = pa.concat_tables(tables).combine_chunks()
        if table.num_rows != split.rows:
            raise TrainingError(f"dataset split {split.name!r} holds {table.num_rows} rows, its manifest {split.rows}")
        return cls(table)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def answer_tokens(self) -> NDArray[np.int64]:
        """Tokens of the chosen (or only) answer by row."""
        return _list_lengths(self._table, self._answer)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row: the prompt once and its answers."""
        total = _list_lengths(self._table, "prompt") + self.answer_tokens
        return total + _list_lengths(self._table, "rejected") if self.paired else total

    def take(self, indices: Iterable[int]) -> list[Example]:
        rows = self._table.take(pa.array([int(index) for index in indices], pa.int64())).to_pylist()
        return [
            Example(
                prompt=row["prompt"],
                chosen=row[self._answer],
                rejected=row.get("rejected"),
                truncated=bool(row.get("truncated", False)),
                ref_chosen=row.get("ref_chosen"),
                ref_rejected=row.get("ref_rejected"),
            )
            for row in rows
        ]


def _list_lengths(table: pa.Table, column: str) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = np.asarray(pc.list_value_length(table[column]), dtype=np.int64)
    return counts
