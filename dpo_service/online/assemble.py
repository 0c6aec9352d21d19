"""From a run to its curator: every part of it made of what the run says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from dpo_service.checkpoint.format import digest_of
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.online.actors import start_pool
from dpo_service.online.curator import Curator, CuratorPlan
from dpo_service.online.feed import Mixed, OnlineFeed, OnlinePlan
from dpo_service.online.judges.build import RewardModelFiles, Surroundings, build_judge
from dpo_service.online.judges.spend import SpentFile
from dpo_service.online.own_judge import ask_policy
from dpo_service.online.pool import SamplerPool
from dpo_service.online.port import Sampler
from dpo_service.online.prompts import OrderedPrompts, PromptTable
from dpo_service.online.samples import SampleFiles
from dpo_service.online.sources import Judged, Rejection, SelfPlay, Source, Winning
from dpo_service.online.steps import CuratorClient
from dpo_service.rows.plan import PromptOrder
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.run import OnlineSpec, RunSpec
from dpo_service.storage import paths
from dpo_service.storage.hub import locate_model
from dpo_service.storage.store import Store
from dpo_service.train.ranks import Ranks
from dpo_service.train.rows import RowTable


def sync_every(online: OnlineSpec) -> int | None:
    """Steps between two syncs of the samplers; None = never."""
    return {"step": 1, "iteration": online.iteration_steps, "never": None}[online.sync]


def plan_of(run: RunSpec, online: OnlineSpec, total_steps: int) -> CuratorPlan:
    return CuratorPlan(
        total_steps=total_steps,
        pairs_per_step=run.batch.batch_size - online.mixed_pairs,
        seed=run.seed,
        staleness=online.staleness,
        sync_every=sync_every(online),
        chunk=max(1, online.samplers.max_num_seqs // online.sampling.n),
    )


async def start_samplers(online: OnlineSpec, model_dir: Path, placement: Any) -> SamplerPool:
    """The samplers, one in each bundle of `placement`.

    Raises:
        TrainingError: one of them cannot be started. None is left behind.
    """
    places = tuple(range(online.samplers.samplers))
    return await start_pool(online.samplers, model_dir, 0, n=online.sampling.n, placement=placement, bundles=places)


def build_curator(
    run: RunSpec,
    dataset: DatasetManifest,
    store: Store,
    model_dir: Path,
    sampler: Sampler,
    placement: Any = None,
) -> Curator:
    """The curator of `run`, whose sampler it closes in the end. A judge's process is in `placement`, after the
    samplers; None = Ray chooses.

    Raises:
        InvalidSpec: the judge needs what is not there.
        TrainingError: the judge cannot be had, or the dataset is not what its manifest says.
    """
    online = run.online
    assert online is not None, "only a run that samples its pairs has a curator"
    tokenizer = Tokenizer.load(model_dir)
    return Curator(
        plan_of(run, online, dataset.total_steps),
        _prompts(run, dataset, store),
        sampler,
        _source(run, online, store, sampler, tokenizer, placement),
        online.sampling,
        partial(tokenizer.decode, special_tokens=False),
        SampleFiles(store, run.job_id),
    )


def _prompts(run: RunSpec, dataset: DatasetManifest, store: Store) -> OrderedPrompts:
    table, batch, data = PromptTable.load(store, dataset.train), run.batch, run.data
    order = PromptOrder(len(table), batch.batch_size, batch.n_epochs, batch.max_steps, data.shuffle, data.seed)
    return OrderedPrompts(table, order)


def build_feed(run: RunSpec, dataset: DatasetManifest, store: Store, client: CuratorClient, ranks: Ranks) -> OnlineFeed:
    """What a rank of the trainer trains on: the pairs of the curator behind `client`, and those of a file, if any."""
    online = run.online
    assert online is not None, "only a run that samples its pairs has a curator"
    return OnlineFeed(
        client,
        OnlinePlan(dataset.steps_per_epoch, dataset.total_steps),
        run.batch,
        ranks,
        sync_every=sync_every(online),
        dtype=online.samplers.dtype,
        mixed=_mixed(run, online, dataset, store),
    )


def _mixed(run: RunSpec, online: OnlineSpec, dataset: DatasetManifest, store: Store) -> Mixed | None:
    if dataset.mix is None:
        return None
    rows = RowTable.load(store, dataset.mix)
    order = PromptOrder(len(rows), 1, 1, None, run.data.shuffle, run.data.seed)
    return Mixed(rows, order, online.mixed_pairs)


def _source(
    run: RunSpec, online: OnlineSpec, store: Store, sampler: Sampler, tokenizer: Tokenizer, placement: Any
) -> Source:
    if online.judge is None:
        return SelfPlay()
    around = Surroundings(
        cache_file=store.path(f"{paths.job_dir(run.job_id)}/verdicts.sqlite"),
        spent_file=SpentFile(store, paths.judge_spent(run.job_id)),
        policy=ask_policy(sampler, tokenizer, run.seed),
        reward_model=_reward_model(online, store, placement),
    )
    judge = build_judge(online.judge, around).judge
    if online.source == "rso":
        return Rejection(judge, online.rejection_beta, online.accepted)
    if online.source == "sppo":
        return Winning(judge, online.win_scale)
    assert online.pairing is not None, "admission decides it for these sources"
    return Judged(judge, online.pairing)


def _reward_model(online: OnlineSpec, store: Store, placement: Any) -> RewardModelFiles | None:
    if online.reward_model is None:
        return None
    directory = locate_model(store, online.reward_model)
    bundle = online.samplers.samplers if placement is not None else -1
    return RewardModelFiles(directory, digest_of(directory), placement=placement, bundle=bundle)
