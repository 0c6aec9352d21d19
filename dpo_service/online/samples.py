"""What was sampled and what was said of it, kept as Parquet: one file a step, one row a prompt.

The loop numbers the step it makes from 0. Users count steps from 1, as metrics and checkpoints do, and so do the files.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_service.online.steps import Turn
from dpo_service.storage import paths
from dpo_service.storage.store import Store

_COMPARED = pa.struct(
    [
        ("first", pa.int32()),
        ("second", pa.int32()),
        ("first_shown_first", pa.string()),
        ("second_shown_first", pa.string()),
        ("missing", pa.string()),
    ]
)
_IDS, _TEXTS = pa.list_(pa.int32()), pa.list_(pa.string())
SAMPLES = pa.schema(
    [
        ("step", pa.int64()),
        ("position", pa.int64()),
        ("prompt_index", pa.int64()),
        ("prompt_ids", _IDS),
        ("prompt_text", pa.string()),
        ("answer_ids", pa.list_(_IDS)),
        ("answer_texts", _TEXTS),
        ("finished", pa.list_(pa.bool_())),
        ("logps", pa.list_(pa.float32())),
        ("versions", pa.list_(pa.int32())),
        ("judge", pa.string()),
        ("scores", pa.list_(pa.float64())),
        ("missing", _TEXTS),
        ("comparisons", pa.list_(_COMPARED)),
        ("replies", _TEXTS),
        ("cached", pa.bool_()),
        ("chosen", _IDS),
        ("rejected", _IDS),
        ("dropped", pa.string()),
    ]
)
"""`prompt_text` is JSON of a text or of messages; `logps` are those of whole answers; a comparison's two columns say
which answer was chosen, `first`, `second` or `tie`, in either order; `chosen` and `rejected` are the pairs by the
answers' places, -1 the row's own answer; `dropped` says why there is no pair."""


class SampleFiles:
    """A `steps.SampleWriter` that keeps a job's samples in storage."""

    def __init__(self, store: Store, job_id: str) -> None:
        self._store, self._job_id = store, job_id

    async def write(self, step: int, turns: tuple[Turn, ...]) -> None:
        """On a thread, so that nobody waits for the disk but the step itself."""
        await asyncio.to_thread(self._write, step + 1, turns)

    def _write(self, step: int, turns: tuple[Turn, ...]) -> None:
        table = pa.Table.from_pylist([_row(step, turn) for turn in turns], schema=SAMPLES)
        with self._store.replacing(paths.samples_file(self._job_id, step)) as temporary:
            pq.write_table(table, temporary)


def _row(step: int, turn: Turn) -> dict[str, Any]:
    return {
        "step": step,
        "position": turn.position,
        "prompt_index": turn.prompt.index,
        "prompt_ids": turn.prompt.token_ids,
        "prompt_text": orjson.dumps(turn.prompt.text, default=str).decode(),
        "answer_ids": [sample.token_ids for sample in turn.samples],
        "answer_texts": turn.texts,
        "finished": [sample.finished for sample in turn.samples],
        "logps": [sample.logp for sample in turn.samples],
        "versions": [sample.version for sample in turn.samples],
        "chosen": [chosen for chosen, _ in turn.places],
        "rejected": [rejected for _, rejected in turn.places],
        "dropped": turn.dropped,
        **_said(turn),
    }


def _said(turn: Turn) -> dict[str, Any]:
    verdict = turn.verdict
    if verdict is None:
        return {}
    return {
        "judge": verdict.judge,
        "scores": verdict.scores,
        "missing": verdict.missing,
        "comparisons": [
            dict(zip(_COMPARED.names, (pair.first, pair.second, *pair.orders, pair.missing), strict=True))
            for pair in verdict.pairs
        ],
        "replies": verdict.replies,
        "cached": verdict.cached,
    }
