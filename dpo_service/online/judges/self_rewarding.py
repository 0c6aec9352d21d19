"""The policy as its own judge: the five additive points of Self-Rewarding (arXiv:2401.10020, figure 2)."""

from __future__ import annotations

import functools
import statistics

from dpo_service.online.judges import prompts
from dpo_service.online.judges.asking import Asked, ask, sampled_scores
from dpo_service.online.judges.chat import ChatRequest, Complete
from dpo_service.online.judges.digests import digest_of
from dpo_service.online.judges.port import Answer, JudgeRequest, Verdict
from dpo_service.online.judges.replies import written_score
from dpo_service.specs.judge import SelfRewardingJudgeSpec

LEAST, MOST = 0, 5


class SelfRewardingJudge:
    """Asks the policy itself, through the sampler's own function. Its verdicts are not cached: the policy moves."""

    name = "self_rewarding"

    def __init__(self, spec: SelfRewardingJudgeSpec, policy: Complete) -> None:
        self._spec = spec
        self._policy = policy
        self.digest = digest_of(spec, prompts.ADDITIVE, without=("limits",))

    async def judge(self, request: JudgeRequest) -> Verdict:
        return await sampled_scores(self.name, request, self._score, self._spec.samples, statistics.fmean)

    async def _score(self, request: JudgeRequest, answer: Answer, sample: int) -> Asked[float]:
        messages = prompts.additive(request, answer)
        question = ChatRequest(messages, self._spec.temperature, self._spec.max_tokens, sample=sample)
        read = functools.partial(written_score, least=LEAST, most=MOST)
        return await ask(self._policy, question, read, prompts.REPAIR_SCORE)

    async def close(self) -> None:
        """The sampler belongs to the loop."""
