"""The prompts of a prepared dataset, as the loop samples from them. Columns as in `DatasetManifest`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_service.errors import TrainingError
from dpo_service.manifests.dataset import SplitManifest
from dpo_service.online.judges.port import Prompt
from dpo_service.rows.plan import PromptOrder
from dpo_service.storage.store import Store


@dataclass(frozen=True)
class PromptRow:
    """One prompt."""

    index: int
    """Its row in the dataset."""
    token_ids: tuple[int, ...]
    text: Prompt
    """As the file has it: a text, or messages."""
    reference: str | None
    """The file's own answer."""
    row: Mapping[str, Any]
    """The row's other columns."""
    answer_ids: tuple[int, ...] = ()
    """The file's own answer in tokens, where it is trained on (SPIN)."""


class PromptTable:
    """A split of prompts, by row."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    @classmethod
    def load(cls, store: Store, split: SplitManifest) -> PromptTable:
        """Raises TrainingError if the files do not hold the rows the manifest says."""
        table = pa.concat_tables([pq.read_table(store.path(key), memory_map=True) for key in split.files])
        if len(table) != split.rows:
            raise TrainingError(f"dataset split {split.name!r} holds {len(table)} rows, its manifest {split.rows}")
        return cls(table.combine_chunks())

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> PromptRow:
        (row,) = self._table.slice(index, 1).to_pylist()
        text = orjson.loads(row["prompt_text"])
        return PromptRow(
            index=index,
            token_ids=tuple(row["prompt"]),
            text=text if isinstance(text, str) else tuple(text),
            reference=row["reference"],
            row=orjson.loads(row["row"]),
            answer_ids=tuple(row.get("answer") or ()),
        )


class OrderedPrompts:
    """The prompts in the order of training (`steps.Prompts`)."""

    def __init__(self, table: PromptTable, order: PromptOrder) -> None:
        self._table, self._order = table, order

    def at(self, position: int) -> PromptRow:
        return self._table[self._order.row(position)]
