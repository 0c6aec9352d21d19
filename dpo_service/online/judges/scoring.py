"""The judge that scores: a language model gives each answer 1 to 10, or ranks all of a prompt's answers at once."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

from dpo_service.online.judges import prompts
from dpo_service.online.judges.asking import Asked, all_replies, all_usage, ask, most_answered, sampled_scores, together
from dpo_service.online.judges.chat import ChatRequest, Complete, Said
from dpo_service.online.judges.digests import digest_of_asked
from dpo_service.online.judges.port import Answer, JudgeRequest, Verdict
from dpo_service.online.judges.replies import field, number_between, written_score
from dpo_service.specs.judge import ScoringJudgeSpec

LEAST, MOST = 1, 10
_TASKS = {"score": prompts.SCORE, "ranking": prompts.RANKING}
_REASON = {"reason": {"type": "string"}}


class ScoringJudge:
    """`score`: the median of an answer's samples. `ranking`: its mean rank over them, the best 1, the last 0.

    Each sample of a ranking shows the answers turned on by one, so that none is always the first.
    """

    name = "scoring"

    def __init__(self, spec: ScoringJudgeSpec, complete: Complete) -> None:
        self._spec = spec
        self._rubric = spec.rubric or prompts.RUBRIC
        self._complete = complete
        self.digest = digest_of_asked(spec, self._rubric, prompts.TASK, _TASKS[spec.mode])

    async def judge(self, request: JudgeRequest) -> Verdict:
        if self._spec.mode == "ranking":
            return await self._ranks(request)
        return await sampled_scores(self.name, request, self._score, self._spec.samples, statistics.median)

    async def _score(self, request: JudgeRequest, answer: Answer, _sample: int) -> Asked[float]:
        messages = prompts.scoring(request, self._rubric, answer, self._spec.show_reference)
        question = self._question(messages, {"score": {"type": "integer", "enum": list(range(LEAST, MOST + 1))}})
        return await ask(self._complete, question, read_score, prompts.REPAIR_JSON)

    async def _ranks(self, request: JudgeRequest) -> Verdict:
        started, count = time.monotonic(), len(request.answers)
        turned = [[(i + turn) % count for i in range(count)] for turn in range(self._spec.samples)]
        asked = await together(self._rank(request, order) for order in turned)
        values, why = most_answered(asked)
        return Verdict(
            judge=self.name,
            scores=tuple(map(statistics.fmean, zip(*values, strict=True))) if values else (None,) * count,
            missing=(why,) * count,
            replies=all_replies(asked),
            usage=all_usage(asked),
            seconds=time.monotonic() - started,
        )

    async def _rank(self, request: JudgeRequest, order: list[int]) -> Asked[tuple[float, ...]]:
        messages = prompts.ranking(
            request, self._rubric, [request.answers[i] for i in order], self._spec.show_reference
        )
        letters = [prompts.letter(place) for place in range(len(order))]
        schema = {"type": "array", "items": {"type": "string", "enum": letters}}
        question = self._question(messages, {"ranking": schema})
        return await ask(self._complete, question, functools.partial(read_ranks, order=order), prompts.REPAIR_JSON)

    def _question(self, messages: tuple[Said, ...], wanted: dict[str, Any]) -> ChatRequest:
        schema = {"type": "object", "properties": _REASON | wanted, "required": ["reason", *wanted]}
        endpoint = self._spec.endpoint
        return ChatRequest(
            messages, endpoint.temperature, endpoint.max_tokens, {**schema, "additionalProperties": False}
        )

    async def close(self) -> None:
        """The connections are those of whoever gave `complete`."""


def read_score(text: str) -> float | None:
    given = field(text, "score")
    return number_between(given, LEAST, MOST) if given is not None else written_score(text, LEAST, MOST)


def read_ranks(text: str, order: list[int]) -> tuple[float, ...] | None:
    """Each answer's rank, 1 the best to 0 the last, by its place in the request; `order` is how they were shown."""
    ranking = field(text, "ranking")
    if not isinstance(ranking, list):
        return None
    named = [str(name).strip().upper().removeprefix("ANSWER ") for name in ranking]
    letters = [prompts.letter(place) for place in range(len(order))]
    if sorted(named) != sorted(letters):
        return None
    ranks = [0.0] * len(order)
    for rank, name in enumerate(named):
        ranks[order[letters.index(name)]] = 1 - rank / max(len(order) - 1, 1)
    return tuple(ranks)
