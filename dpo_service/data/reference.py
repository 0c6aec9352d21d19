"""Reference log-probabilities of a split: computed once by a pool of Ray Data actors, kept for every later job.

They lie under the digest of everything they depend on (`cache_key`), so a job with the same rows, tokenizer, length and
reference model, at the same precision, finds them and no model is loaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray

from dpo_service.data.ray_data import quiet
from dpo_service.errors import NonFiniteLoss
from dpo_service.specs.resources import ResourceSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store

Scorer = Callable[[pa.Table], pa.Table]
"""Given the columns prompt and `ANSWERS` of a kind of rows (list<int32>), adds a float32 column for each of these,
ref_chosen and so on: the sum of the answer's token log-probabilities under the reference."""
ScorerFactory = Callable[[], Scorer]
ROWS_PER_CALL = 64


def cache_key(**depends: Any) -> str:
    """Digest of what the log-probabilities depend on, by name."""
    return hashlib.sha256(orjson.dumps(depends, option=orjson.OPT_SORT_KEYS)).hexdigest()


def reference_logps(
    store: Store,
    files: Sequence[Path],
    rows: int,
    *,
    answers: Sequence[str],
    key: str | None,
    scorer: ScorerFactory,
    resources: ResourceSpec,
    progress: Callable[[int, int], None],
) -> NDArray[np.float32]:
    """Log-probabilities of a split's rows, [rows, answers], in the order of `answers` (`ANSWERS`: two columns).

    `key` None = neither read nor kept.

    Raises:
        NonFiniteLoss: the reference gives a row no finite probability.
    """
    if key is not None and (known := _read(store, key, rows, answers)) is not None:
        progress(rows, rows)
        return known
    values = _compute(files, rows, answers, scorer, resources, progress)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise NonFiniteLoss(f"the reference model gives row {bad[0]} a log-probability that is not finite")
    if key is not None:
        with store.publishing(paths.reference_cache(key)) as directory:
            table = pa.table({name: values[:, column] for column, name in enumerate(answers)})
            pq.write_table(table, directory / "reference.parquet")
    return values


def _read(store: Store, key: str, rows: int, answers: Sequence[str]) -> NDArray[np.float32] | None:
    path = store.path(paths.reference_cache(key)) / "reference.parquet"
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException):  # not there, or damaged: computed again
        return None
    if len(table) != rows or table.column_names != list(answers):
        return None
    return np.stack([table[name].to_numpy() for name in answers], axis=1).astype(np.float32)


def _compute(
    files: Sequence[Path],
    rows: int,
    answers: Sequence[str],
    scorer: ScorerFactory,
    resources: ResourceSpec,
    progress: Callable[[int, int], None],
) -> NDArray[np.float32]:
    values = np.full((rows, len(answers)), np.nan, np.float32)
    actors, cpus = _pool(rows, resources)
    done = 0
    with quiet():
        dataset = ray.data.read_parquet(
            [str(path) for path in files],
            columns=["index", "prompt", *answers],
            override_num_blocks=max(len(files), math.ceil(rows / ROWS_PER_CALL)),
            num_cpus=0.1,
        ).map_batches(
            _Scoring,
            fn_constructor_args=(scorer, answers),
            batch_size=ROWS_PER_CALL,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=cpus,
            num_gpus=resources.gpus_per_worker,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(resources.cpus_per_worker)}},
        )
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            scores = [table[name].to_numpy() for name in answers]
            values[table["index"].to_numpy()] = np.stack(scores, axis=1)
            done += len(table)
            progress(done, rows)
    return values


def _pool(rows: int, resources: ResourceSpec) -> tuple[int, float]:
    """Actors and CPUs of each: what the job may take, and never so much that reading the rows finds no CPU."""
    actors = min(resources.workers, math.ceil(rows / ROWS_PER_CALL))
    free = ray.available_resources().get("CPU", 0.0)
    cpus = min(float(resources.cpus_per_worker), 0.9 * free / actors)
    return actors, math.floor(cpus * 100) / 100


class _Scoring:
    """The actor: builds the scorer where it runs, and sends back nothing but the scores."""

    def __init__(self, factory: ScorerFactory, answers: Sequence[str]) -> None:
        self._scorer, self._answers = factory(), answers

    def __call__(self, table: pa.Table) -> pa.Table:
        scored = self._scorer(table.select(["prompt", *self._answers]))
        return pa.table({"index": table["index"], **{name: scored[f"ref_{name}"] for name in self._answers}})


def add_columns(files: Sequence[Path], answers: Sequence[str], values: NDArray[np.float32]) -> None:
    """Write the log-probabilities beside the rows they belong to."""
    start = 0
    for path in files:
        table = pq.read_table(path)
        part = values[start : start + len(table)]
        start += len(table)
        for column, name in enumerate(answers):
            table = table.append_column(f"ref_{name}", pa.array(part[:, column], pa.float32()))
        pq.write_table(table, path)
