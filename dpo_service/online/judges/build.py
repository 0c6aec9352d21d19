"""From what a job asks for to a judge that can be asked: everything that stands around it, put together.

    Counted ──> Cached ──> the judge ──> Paid ──> Retry ──> Breaker ──> Limit ──> Timeout ──> the endpoint

The policy as its own judge is neither paid for nor cached: it moves. Rules and reward models ask nobody; rules are as
quick as the cache would be.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_service.errors import InvalidSpec
from dpo_service.online.judges.cache import Cached, VerdictFile
from dpo_service.online.judges.chat import Complete
from dpo_service.online.judges.endpoint import Endpoint
from dpo_service.online.judges.metrics import Counted
from dpo_service.online.judges.pairwise import PairwiseJudge
from dpo_service.online.judges.port import Judge, JudgeRequest, Verdict
from dpo_service.online.judges.resilience import protected
from dpo_service.online.judges.reward_model import RewardModelJudge, Scorer
from dpo_service.online.judges.rules import RulesJudge
from dpo_service.online.judges.scoring import ScoringJudge
from dpo_service.online.judges.self_rewarding import SelfRewardingJudge
from dpo_service.online.judges.spend import Paid, Purse, SpentFile
from dpo_service.specs.judge import (
    JudgeSpec,
    PairwiseJudgeSpec,
    RewardModelJudgeSpec,
    RulesJudgeSpec,
    ScoringJudgeSpec,
    SelfRewardingJudgeSpec,
)


@dataclass(frozen=True)
class RewardModelFiles:
    """Where a job's reward model lies, which weights these are, and the device that computes it."""

    directory: Path
    digest: str
    device: str = "cpu"
    placement: Any = None
    """The placement group of the job's actors; None = Ray chooses where a process of its own is."""
    bundle: int = -1
    """Its place there."""


@dataclass(frozen=True)
class Surroundings:
    """What the loop has for a judge."""

    cache_file: Path | None = None
    policy: Complete | None = None
    """Samples from the policy: for a policy that judges itself."""
    reward_model: RewardModelFiles | None = None
    spent_file: SpentFile | None = None
    """Keeps what the job's judge has cost, over all its attempts."""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)


@dataclass(frozen=True)
class BuiltJudge:
    judge: Counted
    purse: Purse | None
    """None = this judge costs nothing a call."""


def build_judge(spec: JudgeSpec, around: Surroundings) -> BuiltJudge:
    """
    Raises:
        InvalidSpec: the job asks for what is not there: a key, a verifier, a reward model.
        JudgeError: a registered verifier cannot be imported.
    """
    if isinstance(spec, PairwiseJudgeSpec | ScoringJudgeSpec):
        return _over_an_endpoint(spec, around)
    judge: Judge
    if isinstance(spec, RewardModelJudgeSpec):
        judge = _cached(_reward_model(spec, around), spec.cache, around)
    elif isinstance(spec, RulesJudgeSpec):
        judge = RulesJudge(spec)
    else:
        judge = _self_rewarding(spec, around)
    return BuiltJudge(Counted(judge), None)


def _over_an_endpoint(spec: PairwiseJudgeSpec | ScoringJudgeSpec, around: Surroundings) -> BuiltJudge:
    endpoint = Endpoint(spec.endpoint, around.environ)
    purse = Purse(spec.endpoint.price, spec.endpoint.spend_cap, around.spent_file)
    complete = Paid(protected(endpoint.complete, spec.endpoint.limits), purse)
    inner: Judge = (
        PairwiseJudge(spec, complete) if isinstance(spec, PairwiseJudgeSpec) else ScoringJudge(spec, complete)
    )
    return BuiltJudge(Counted(_cached(Closing(inner, endpoint), spec.cache, around), purse), purse)


def _cached(judge: Judge, wanted: bool, around: Surroundings) -> Judge:
    return Cached(judge, VerdictFile(around.cache_file)) if wanted and around.cache_file is not None else judge


def _self_rewarding(spec: SelfRewardingJudgeSpec, around: Surroundings) -> SelfRewardingJudge:
    assert around.policy is not None, "the loop gives its sampler to a policy that judges itself"
    return SelfRewardingJudge(spec, protected(around.policy, spec.limits))


def _reward_model(spec: RewardModelJudgeSpec, around: Surroundings) -> Judge:
    files = around.reward_model
    if files is None:
        raise InvalidSpec(f"the reward model {spec.model!r} was not found", param="judge.model")
    return RewardModelJudge(spec, files.directory, files.digest, _scorer(spec, files))


def _scorer(spec: RewardModelJudgeSpec, files: RewardModelFiles) -> Scorer:
    """Each imports what the other does not need."""
    if spec.engine == "vllm":
        from dpo_service.online.judges.reward_actor import start_scorer

        return start_scorer(spec, files.directory, files.placement, files.bundle)
    from dpo_service.online.judges.reward_inprocess import InProcess, RewardModel

    return InProcess(RewardModel(files.directory, spec, files.device))


class Closing:
    """`judge`, with the endpoint that is its own."""

    def __init__(self, judge: Judge, endpoint: Endpoint) -> None:
        self._judge = judge
        self._endpoint = endpoint
        self.name = judge.name
        self.digest = judge.digest

    async def judge(self, request: JudgeRequest) -> Verdict:
        return await self._judge.judge(request)

    async def close(self) -> None:
        await self._endpoint.close()
