"""The prepared dataset as the training side sees it: rows of token ids, addressed by index."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dpo_service.errors import TrainingError
from dpo_service.manifests.dataset import ANSWERS, SplitManifest
from dpo_service.specs.method import RowKind
from dpo_service.storage.store import Store

_KINDS: tuple[RowKind, ...] = ("pairs", "unpaired", "answers")
"""In the order in which they are told by their columns: the last one's are part of the second's."""


@dataclass(frozen=True)
class Example:
    """One row. Token ids; `rejected` is None for a row with a single answer, which is `chosen`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None = None
    truncated: bool = False
    ref_chosen: float | None = None
    ref_rejected: float | None = None
    label: float | None = None
    """Of an unpaired answer: 1 = desirable, 0 = undesirable. Of a pair: the judged probability that chosen wins."""
    sampled_chosen: float | None = None
    """Log-probability as the sampler of the answer computed it; None = it was not sampled for this run."""
    sampled_rejected: float | None = None


class RowTable:
    """A split of the dataset, rows in `index` order. Columns as in `DatasetManifest`."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.kind = next(kind for kind in _KINDS if set(ANSWERS[kind]) <= set(table.column_names))
        self._answer, *others = ANSWERS[self.kind]
        self._other = others[0] if others else ""
        self.has_reference = f"ref_{self._answer}" in table.column_names

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
        """Tokens of each row: the prompt once and its answers, of unpaired rows the mismatched one too."""
        return sum(
            (_list_lengths(self._table, name) for name in ANSWERS[self.kind]), _list_lengths(self._table, "prompt")
        )

    def take(self, indices: Iterable[int]) -> list[Example]:
        """The rows to train on."""
        return [
            self._example(row, self._answer, self._other if self.kind == "pairs" else "") for row in self._rows(indices)
        ]

    def mismatched(self, indices: Iterable[int]) -> list[Example]:
        """The prompts of unpaired rows, each with another row's answer."""
        return [self._example(row, self._other, "") for row in self._rows(indices)]

    def whole(self, indices: Iterable[int]) -> list[Example]:
        """The rows with all their answers, for a reference to score."""
        return [self._example(row, self._answer, self._other) for row in self._rows(indices)]

    def _rows(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._table.take(
            pa.array([int(index) for index in indices], pa.int64())
        ).to_pylist()
        return rows

    @staticmethod
    def _example(row: dict[str, Any], first: str, second: str) -> Example:
        return Example(
            prompt=row["prompt"],
            chosen=row[first],
            rejected=row.get(second),
            truncated=bool(row.get("truncated", False)),
            ref_chosen=row.get(f"ref_{first}"),
            ref_rejected=row.get(f"ref_{second}"),
            label=row.get("label"),
        )


def _list_lengths(table: pa.Table, column: str) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = np.asarray(pc.list_value_length(table[column]), dtype=np.int64)
    return counts
