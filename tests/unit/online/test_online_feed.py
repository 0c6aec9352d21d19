"""The one training loop on sampled pairs: a curator in this process, a transformers sampler, a rule for a judge."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from dpo_service.errors import StopAsked
from dpo_service.online.curator import Curator, CuratorPlan
from dpo_service.online.evaluation import HeldOut, Question
from dpo_service.online.fake_sampler import FakeSampler
from dpo_service.online.feed import OnlineFeed, OnlinePlan
from dpo_service.online.inprocess import InProcessCurator
from dpo_service.online.judges.metrics import Counted
from dpo_service.online.judges.port import Verdict
from dpo_service.online.prompts import PromptRow
from dpo_service.online.sources import Judged
from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.eval import BestSpec
from dpo_service.specs.method import RefreshSpec
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from dpo_service.train.ranks import Ranks
from tests.unit.online.curator_kit import KeptSamples, SomePrompts
from tests.unit.train.training_kit import make_job, same, weights

SIZE = 8
LIKED = range(100)
"""Tokens that the judge likes: a third of the vocabulary."""


class Likes:
    """A verifier: the share of an answer's tokens that are among the liked ones."""

    name, digest = "likes", "d"

    async def judge(self, request):
        return Verdict(self.name, tuple(liked(answer.token_ids) for answer in request.answers))

    async def close(self): ...


def liked(tokens):
    return sum(token in LIKED for token in tokens) / len(tokens)


class Reports:
    """Keeps the metrics."""

    def __init__(self):
        self.told, self.valid, self.messages = [], {}, []

    def metrics(self, split, step, values, text):
        if split == "eval":
            self.valid[step] = values
            self.messages.append(text)
        else:
            self.told.append(values)

    def message(self, text, **__):
        self.messages.append(text)

    def checkpoint(self, *_): ...
    def reference(self, *_): ...
    def progress(self, *_): ...


def online_job(root, model_dir, *, steps, **options):
    job = make_job(
        root, model_dir, reference="live", steps=steps, batch_size=SIZE, micro_batch_size=4, validation=0, **options
    )
    return job


def trained(
    job, *, staleness=0, sync_every=1, sampler=None, reports=None, kept=None, held_out=0, feed=OnlineFeed, **options
):
    """The job's run on sampled pairs, and its outcome; `held_out` prompts are evaluated."""
    run, total = job.run, job.run.batch.max_steps
    spec = SamplerSpec(dtype="float32", lora_rank=8 if run.lora else None)

    def make():
        return Curator(
            CuratorPlan(total, SIZE, seed=3, staleness=staleness, sync_every=sync_every),
            SomePrompts(),
            sampler or FakeSampler(spec, job.model_dir, 0),
            Judged(Counted(Likes()), PairingSpec(cut_off="any")),
            SamplingSpec(n=4, max_tokens=4),
            lambda ids: " ".join(map(str, ids)),
            kept,
            HeldOut(rows, Likes(), Question(SamplingSpec(n=1, max_tokens=4), 3, str)) if rows else None,
        )

    rows = [PromptRow(index, (40 + index, 41), "a prompt", None, {}) for index in range(held_out)]
    evaluated = {"validates": held_out > 0, "base_dir": job.model_dir}
    with InProcessCurator(make) as client:
        made = feed(client, OnlinePlan(2, total), run.batch, Ranks(), sync_every=sync_every, **evaluated)
        return job.train(feed=made, reports=reports, **options)


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_verifiers_score_rises(tmp_path, model_dir, staleness):
    job, reports, kept = online_job(tmp_path, model_dir, steps=16, learning_rate=1e-2), Reports(), KeptSamples()
    outcome = trained(job, staleness=staleness, reports=reports, kept=kept)
    assert outcome.steps == 16
    scores = [values["online/reward"] for values in reports.told]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.1
    assert all(values["online/staleness"] <= staleness for values in reports.told)
    assert sorted(kept.steps) == list(range(16))


def test_on_policy_the_samplers_log_probabilities_are_the_trainers(tmp_path, model_dir):
    reports = Reports()
    trained(online_job(tmp_path, model_dir, steps=4), staleness=0, reports=reports)
    assert max(values["online/logp_gap"] for values in reports.told) < 1e-4
    stale = Reports()
    trained(online_job(tmp_path / "stale", model_dir, steps=4), staleness=1, reports=stale)
    assert max(values["online/logp_gap"] for values in stale.told) > 1e-3, "a policy that has moved is noticed"


def test_an_adapter_goes_to_the_samplers_as_one(tmp_path, model_dir):
    reports = Reports()
    trained(online_job(tmp_path, model_dir, steps=4, lora=LoraSpec(rank=8)), staleness=0, reports=reports)
    assert max(values["online/logp_gap"] for values in reports.told) < 1e-4
    assert reports.told[-1]["logps/chosen"] != reports.told[0]["logps/chosen"]


class StoppedWaiting(OnlineFeed):
    """Asked to stop while it waits for the pairs of step 2."""

    def batches(self, step):
        if step == 2:
            raise StopAsked("asked to stop while pairs were waited for")
        return super().batches(step)


@pytest.mark.parametrize(("lora", "waiting"), [(None, False), (LoraSpec(rank=8), False), (None, True)])
def test_stopped_and_resumed_on_policy_it_is_the_unbroken_run(tmp_path, model_dir, lora, waiting):
    whole = trained(online_job(tmp_path / "whole", model_dir, steps=4, lora=lora))
    job = online_job(tmp_path / "parts", model_dir, steps=4, lora=lora)
    asked = iter([False] * 2 + [not waiting])
    first = trained(job, stop=lambda: next(asked), feed=StoppedWaiting if waiting else OnlineFeed)
    assert (first.steps, first.stopped) == (2, True)
    second = trained(job)
    assert second.metrics["rewards/margins"] == whole.metrics["rewards/margins"]
    assert second.metrics["online/reward"] == whole.metrics["online/reward"]


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=8)])
def test_resumed_within_an_iteration_it_samples_from_the_iterate(tmp_path, model_dir, lora):
    """Iterations of two steps: the run is stopped after the third, and the samplers get version 2 again."""
    options = {"steps": 4, "lora": lora, "refresh": RefreshSpec(every_steps=2)}
    whole = trained(online_job(tmp_path / "whole", model_dir, **options), sync_every=2)
    job = online_job(tmp_path / "parts", model_dir, **options)
    asked = iter([False] * 3 + [True])
    assert trained(job, stop=lambda: next(asked), sync_every=2).steps == 3
    second = trained(job, sync_every=2)
    assert second.metrics["rewards/margins"] == whole.metrics["rewards/margins"]
    assert second.metrics["online/reward"] == whole.metrics["online/reward"]


WAYS = {
    "step": ({}, {}),
    "iteration": ({"refresh": RefreshSpec(every_steps=2)}, {"sync_every": 2}),
    "iteration-lora": ({"refresh": RefreshSpec(every_steps=2), "lora": LoraSpec(rank=8)}, {"sync_every": 2}),
    "never": ({}, {"sync_every": None}),
    "never-lora": ({"lora": LoraSpec(rank=8)}, {"sync_every": None}),
}
"""How samplers follow: options of the job, and of its run."""


@pytest.mark.parametrize("way", WAYS)
def test_evaluated_after_every_step_and_resumed_it_is_the_unbroken_run_without(tmp_path, model_dir, way):
    of_job, of_run = WAYS[way]
    plain = online_job(tmp_path / "plain", model_dir, steps=4, **of_job)
    trained(plain, **of_run)
    job, reports = online_job(tmp_path / "evaluated", model_dir, steps=4, eval_every_steps=1, **of_job), Reports()
    asked = iter([False] * 3 + [True])
    assert trained(job, held_out=4, reports=reports, stop=lambda: next(asked), **of_run).steps == 3
    trained(job, held_out=4, reports=reports, **of_run)
    assert all(same(one, other) for one, other in zip(weights(job), weights(plain), strict=True))
    assert sorted(reports.valid) == [0, 1, 2, 3, 4]
    assert max(values["valid/logp_gap"] for values in reports.valid.values()) < 1e-4, "the policy of now has answered"
    assert abs(reports.valid[0]["valid/kl"]) < 1e-5 < abs(reports.valid[4]["valid/kl"])


def test_an_evaluation_says_reward_and_distance_from_the_reference(tmp_path, model_dir):
    job = online_job(tmp_path, model_dir, steps=12, learning_rate=1e-2, eval_every_steps=4)
    reports, without = Reports(), Reports()
    outcome = trained(job, held_out=24, reports=reports)
    trained(online_job(tmp_path / "without", model_dir, steps=12, learning_rate=1e-2), reports=without)
    first, last = reports.valid[0], reports.valid[12]
    assert set(first) >= {"valid/reward", "valid/finished_share", "valid/answer_tokens", "valid/kl", "judge/verdicts"}
    assert (abs(first["valid/kl"]) < 1e-5, first["judge/verdicts"]) == (True, 24)
    assert last["valid/kl"] > 0.1
    assert last["valid/reward"] > first["valid/reward"]
    assert outcome.metrics["valid/reward"] == last["valid/reward"]
    assert any(text.startswith("Step 12/12: validation reward=") for text in reports.messages)
    counts = ("judge/verdicts", "online/valid_share", "online/reward", "online/answer_tokens", "num_tokens")
    assert [[told[name] for name in counts] for told in reports.told] == [
        [told[name] for name in counts] for told in without.told
    ]


def test_the_best_by_reward_is_published(tmp_path, model_dir):
    best = BestSpec(keep=1, metric="valid/reward", better="higher", publish=True)
    job = online_job(
        tmp_path, model_dir, steps=4, learning_rate=1e-2, save_every_steps=1, keep_checkpoints=1, keep_best=best
    )
    reports = Reports()
    outcome = trained(job, held_out=6, reports=reports)
    rewards = {step: values["valid/reward"] for step, values in reports.valid.items() if step}
    highest = max(rewards, key=lambda step: (rewards[step], -step))
    assert outcome.checkpoint.endswith(f"step-{highest:08d}")


def test_without_a_scored_answer_the_last_checkpoint_is_published(tmp_path, model_dir, monkeypatch):
    async def nothing(self, request):
        few = len(request.answers) == 1
        return Verdict("likes", tuple(None if few else liked(one.token_ids) for one in request.answers))

    monkeypatch.setattr(Likes, "judge", nothing)
    best = BestSpec(keep=1, metric="valid/reward", better="higher", publish=True)
    job, reports = online_job(tmp_path, model_dir, steps=2, keep_best=best), Reports()
    outcome = trained(job, held_out=2, reports=reports)
    assert outcome.checkpoint.endswith("step-00000002")
    assert any("No checkpoint could be ranked by valid/reward" in text for text in reports.messages)
    assert reports.valid[2]["valid/missing/abstained"] == 2


def test_no_weights_are_left_in_shared_memory(tmp_path, model_dir):
    job = online_job(tmp_path, model_dir, steps=2)
    trained(job)
    job = dataclasses.replace(job, run=job.run.model_copy(update={"job_id": "k"}))

    class Failing(FakeSampler):
        async def sample(self, prompts, options):
            raise ZeroDivisionError

    failing = Failing(SamplerSpec(), job.model_dir, 0)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        trained(job, sampler=failing)
    assert not list(Path("/dev/shm").glob(f"dpo-weights-{os.getpid()}-*"))
