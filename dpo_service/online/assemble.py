"""From a run to its curator: every part of it made of what the run says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dpo_service.checkpoint.format import digest_of
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.online.actors import Place, bundles, start_pool
from dpo_service.online.curator import Curator, CuratorPlan
from dpo_service.online.evaluation import SEEDS, HeldOut, Question
from dpo_service.online.feed import Mixed, OnlineFeed, OnlinePlan
from dpo_service.online.judges.build import RewardModelFiles, Surroundings, build_judge
from dpo_service.online.judges.chat import Complete
from dpo_service.online.judges.metrics import Counted
from dpo_service.online.judges.port import Judge
from dpo_service.online.judges.spend import SpentFile
from dpo_service.online.own_judge import ask_policy
from dpo_service.online.pool import SamplerPool
from dpo_service.online.port import Sampler, seed_of
from dpo_service.online.prompts import OrderedPrompts, PromptTable
from dpo_service.online.samples import SampleFiles
from dpo_service.online.sources import Judged, Rejection, SelfPlay, Source, Winning
from dpo_service.online.steps import CuratorClient
from dpo_service.rows.plan import PromptOrder
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.judge import SelfRewardingJudgeSpec, only_compares
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
        takes_turns=online.samplers.shares_device,
        sync_every=sync_every(online),
        chunk=max(1, online.samplers.max_num_seqs // online.sampling.n),
    )


async def start_samplers(
    online: OnlineSpec, model_dir: Path, placement: Any, beside: Sequence[Place] = ()
) -> SamplerPool:
    """The samplers, one in each bundle of `placement`, or `beside` the workers whose devices they share.

    Raises:
        TrainingError: one of them cannot be started. None is left behind.
    """
    places = tuple(range(online.samplers.samplers))
    n = online.sampling.n
    return await start_pool(online.samplers, model_dir, 0, n=n, placement=placement, bundles=places, beside=beside)


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
    decode = partial(tokenizer.decode, special_tokens=False)
    around = Surroundings(
        cache_file=store.path(f"{paths.job_dir(run.job_id)}/verdicts.sqlite"),
        spent_file=SpentFile(store, paths.judge_spent(run.job_id)),
        policy=ask_policy(sampler, tokenizer, run.seed),
        reward_model=_reward_model(online, store, placement),
    )
    judge = build_judge(online.judge, around).judge if online.judge is not None else None
    apart = _apart(judge, online, around, ask_policy(sampler, tokenizer, seed_of(run.seed, 0, SEEDS)))
    return Curator(
        plan_of(run, online, dataset.total_steps),
        _prompts(run, dataset, store),
        sampler,
        _source(online, judge),
        online.sampling,
        decode,
        SampleFiles(store, run.job_id),
        _held_out(run, dataset, store, apart, decode),
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
        samplers=online.samplers,
        # Samplers on GPUs may be on other machines than rank 0, whose memory they do not see.
        shared=store.path(paths.weights_dir(run.job_id)) if online.samplers.gpus else None,
        mixed=_mixed(run, online, dataset, store),
        validates=dataset.validation is not None,
        base_dir=locate_model(store, run.model) if online.sync == "never" and dataset.validation else None,
    )


def _mixed(run: RunSpec, online: OnlineSpec, dataset: DatasetManifest, store: Store) -> Mixed | None:
    if dataset.mix is None:
        return None
    rows = RowTable.load(store, dataset.mix)
    order = PromptOrder(len(rows), 1, 1, None, run.data.shuffle, run.data.seed)
    return Mixed(rows, order, online.mixed_pairs)


def _source(online: OnlineSpec, judge: Counted | None) -> Source:
    if judge is None:
        return SelfPlay()
    if online.source == "rso":
        return Rejection(judge, online.rejection_beta, online.accepted)
    if online.source == "sppo":
        return Winning(judge, online.win_scale)
    assert online.pairing is not None, "admission decides it for these sources"
    return Judged(judge, online.pairing)


def _apart(judge: Counted | None, online: OnlineSpec, around: Surroundings, policy: Complete) -> Judge | None:
    """The judge of held-out answers: the same, of whom training's counts do not hear. A policy that judges itself is
    asked through `policy`, with dice of its own, so that those of training fall as they would."""
    if isinstance(online.judge, SelfRewardingJudgeSpec):
        judge = build_judge(online.judge, replace(around, policy=policy)).judge
    return judge.uncounted if judge is not None else None


def _held_out(
    run: RunSpec, dataset: DatasetManifest, store: Store, judge: Judge | None, decode: Callable[[Sequence[int]], str]
) -> HeldOut | None:
    """The prompts of the validation split, each answered once: more prompts tell more than more answers."""
    online = run.online
    if dataset.validation is None or online is None:
        return None
    table, options = PromptTable.load(store, dataset.validation), online.sampling.model_copy(update={"n": 1})
    chunk, compares = online.samplers.max_num_seqs, only_compares(online.judge)
    question = Question(options, run.seed, decode, against_own=compares, chunk=chunk)
    return HeldOut([table[index] for index in range(len(table))], judge, question)


def _reward_model(online: OnlineSpec, store: Store, placement: Any) -> RewardModelFiles | None:
    if online.reward_model is None:
        return None
    directory = locate_model(store, online.reward_model)
    bundle = len(bundles(online.samplers)) if placement is not None else -1
    return RewardModelFiles(directory, digest_of(directory), placement=placement, bundle=bundle)
