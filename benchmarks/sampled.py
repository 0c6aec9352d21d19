"""Benchmarks' runs on sampled pairs: a dataset of prompts, a sampler in a process of its own, a curator in this one.

    this process: trainer ── InProcessCurator (a thread) ── SamplerPool ──> a Ray actor: vLLM, on one thread

The sampler outlives a run: the next one begins by giving it its own first weights.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_service.manifests.dataset import DatasetManifest, DatasetReport, SplitManifest
from dpo_service.online.port import Sample, SamplePrompt, Sampler, Synced, Weights
from dpo_service.specs.method import RowKind
from dpo_service.specs.run import RunSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store


class Kept:
    """A sampler that outlives who uses it, from any event loop: not more is asked of it than can be from several."""

    def __init__(self, sampler: Sampler, version: int) -> None:
        self._sampler, self.version_now = sampler, version

    async def sample(self, prompts: Sequence[SamplePrompt], options: SamplingSpec) -> list[tuple[Sample, ...]]:
        return await self._sampler.sample(prompts, options)

    async def sync(self, weights: Weights) -> Synced:
        synced = await self._sampler.sync(weights)
        self.version_now = synced.version
        return synced

    async def version(self) -> int:
        return self.version_now

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def close(self) -> None: ...


@contextmanager
def sampler_process(spec: SamplerSpec, model_dir: Path) -> Iterator[Kept]:
    """A vLLM sampler in a Ray actor, on a cluster of its own."""
    with private_cluster(model_dir.parent):
        from dpo_service.online.actors import start_actor

        sampler = start_actor(spec, model_dir, 0)
        yield Kept(sampler, asyncio.run(sampler.version()))
        asyncio.run(sampler.close())


@contextmanager
def private_cluster(folder: Path) -> Iterator[str]:
    """Ray for this process and those it starts; its address. `folder` gets the token that lets them in: without one,
    Ray would write it to the user's home, where it changes what every other cluster of the user asks for."""
    token = folder / "ray-token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "HF_HUB_OFFLINE": "1"}
    # Actors yield to nobody: a trainer in this process is no Ray worker.
    os.environ |= {"RAY_worker_niceness": "0"}
    import ray

    context = ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        yield context.address_info["gcs_address"]
    finally:
        ray.shutdown()


def train_on_samples(
    run: RunSpec, dataset: DatasetManifest, store: Store, model_dir: Path, sampler: Kept, reports: Any = None
) -> Any:
    """`train.loop.train` of a run that samples its pairs, from its first step to its last."""
    from dpo_service.checkpoint.format import digest_of
    from dpo_service.online.assemble import build_curator, build_feed
    from dpo_service.online.curator import Curator
    from dpo_service.online.inprocess import InProcessCurator
    from dpo_service.online.pool import Member, SamplerPool
    from dpo_service.train.loop import train
    from dpo_service.train.ranks import Ranks

    assert run.online is not None

    def curator() -> Curator:
        chunk = max(1, run.online.samplers.max_num_seqs // run.online.sampling.n)
        pool = SamplerPool([Member(sampler, sampler.version_now, _never_again)], chunk=chunk)
        return build_curator(run, dataset, store, model_dir, pool)

    with InProcessCurator(curator) as client:
        feed = build_feed(run, dataset, store, client, Ranks())
        return train(run, dataset, model_dir, store=store, base_digest=digest_of(model_dir), reports=reports, feed=feed)


async def _never_again() -> None:
    from dpo_service.errors import SamplerLost

    raise SamplerLost("the benchmark's sampler has died, and is not started again")


@dataclass
class Told:
    """What a run reports of its steps, with the times it does so (`train.journal.Reports`)."""

    steps: list[dict[str, float]] = field(default_factory=list)
    at: list[float] = field(default_factory=list)

    def metrics(self, split: str, step: int, values: Mapping[str, float], text: str) -> None:
        if split == "train":
            self.steps.append(dict(values))
            self.at.append(time.perf_counter())

    def message(self, text: str, **_: Any) -> None: ...

    def checkpoint(self, *_: Any) -> None: ...

    def reference(self, *_: Any) -> None: ...

    def progress(self, *_: Any) -> None: ...


def prompt_columns(texts: Sequence[str], token_ids: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
    """The columns of prompts whose answers are sampled."""
    count = len(texts)
    return {
        "index": list(range(count)),
        "prompt": [list(ids) for ids in token_ids],
        "truncated": [False] * count,
        "prompt_text": [json.dumps(text) for text in texts],
        "reference": [None] * count,
        "row": ["{}"] * count,
    }


def write_dataset(
    store: Store,
    job_id: str,
    rows: RowKind,
    columns: Mapping[str, list[Any]],
    *,
    batch: int,
    steps: int,
    score: Callable[[Any], Any] | None = None,
    reference_digest: str | None = None,
) -> DatasetManifest:
    """A prepared dataset of rows that are token ids already. `score` adds the reference's log-probabilities."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"index": pa.int64(), "truncated": pa.bool_()} | dict.fromkeys(
        ("prompt_text", "reference", "row"), pa.string()
    )
    table = pa.table(
        {name: pa.array(values, types.get(name, pa.list_(pa.int32()))) for name, values in columns.items()}
    )
    key = f"{paths.dataset_dir(job_id)}/train.parquet"
    store.path(key).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(score(table) if score is not None else table, store.path(key))
    return DatasetManifest(
        rows=rows,
        train=SplitManifest(name="train", files=(key,), rows=table.num_rows, tokens=0, digest="bench"),
        report=DatasetReport(format="bench", rows=table.num_rows, kept=table.num_rows),
        plan=f"{paths.dataset_dir(job_id)}/plan.parquet",
        steps_per_epoch=max(1, table.num_rows // batch),
        total_steps=steps,
        tokenizer_digest="bench",
        reference_digest=reference_digest,
    )
