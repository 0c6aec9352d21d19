"""The judge that compares: a language model says which of two answers is better, asked in both orders.

answers 0 1 2 -> pairs (0,1) (0,2) (1,2) -> each asked as A,B and as B,A -> agree: decided; disagree: a tie
                                         -> score of an answer: its share of wins, a tie being half a win
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from dpo_service.online.judges import prompts
from dpo_service.online.judges.asking import Asked, all_replies, all_usage, ask, together
from dpo_service.online.judges.chat import ChatRequest, Complete
from dpo_service.online.judges.digests import digest_of_asked
from dpo_service.online.judges.port import TIED, Choice, JudgeRequest, PairVerdict, Verdict
from dpo_service.online.judges.replies import field
from dpo_service.specs.judge import PairwiseJudgeSpec

_SCHEMA = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "winner": {"type": "string", "enum": ["A", "B", "tie"]}},
    "required": ["reason", "winner"],
    "additionalProperties": False,
}
_CHOICES: dict[str, Choice] = {"a": "first", "b": "second", "answer a": "first", "answer b": "second", "tie": "tie"}
_TURNED: dict[Choice, Choice] = {"first": "second", "second": "first", "tie": "tie"}


class PairwiseJudge:
    name = "pairwise"

    def __init__(self, spec: PairwiseJudgeSpec, complete: Complete) -> None:
        self._spec = spec
        self._rubric = spec.rubric or prompts.RUBRIC
        self._complete = complete
        self.digest = digest_of_asked(spec, self._rubric, prompts.TASK, prompts.PAIRWISE)

    async def judge(self, request: JudgeRequest) -> Verdict:
        started = time.monotonic()
        places = list(itertools.combinations(range(len(request.answers)), 2))
        orders = [order for first, second in places for order in ((first, second), (second, first))]
        asked = await together(self._compare(request, *order) for order in orders)
        pairs = tuple(_verdict(*place, *asked[2 * i : 2 * i + 2]) for i, place in enumerate(places))
        scored = [win_share(answer, pairs) for answer in range(len(request.answers))]
        return Verdict(
            judge=self.name,
            scores=tuple(score for score, _ in scored),
            missing=tuple(why for _, why in scored),
            pairs=pairs,
            replies=all_replies(asked),
            usage=all_usage(asked),
            seconds=time.monotonic() - started,
        )

    async def _compare(self, request: JudgeRequest, shown_first: int, shown_second: int) -> Asked[Choice]:
        answers = request.answers[shown_first], request.answers[shown_second]
        messages = prompts.comparison(request, self._rubric, *answers, self._spec.show_reference)
        endpoint = self._spec.endpoint
        question = ChatRequest(messages, endpoint.temperature, endpoint.max_tokens, _SCHEMA)
        return await ask(self._complete, question, read_choice, prompts.REPAIR_JSON)

    async def close(self) -> None:
        """The connections are those of whoever gave `complete`."""


def read_choice(text: str) -> Choice | None:
    """Which answer a reply prefers, by the place it was shown at."""
    winner = field(text, "winner")
    return _CHOICES.get(winner.strip().casefold()) if isinstance(winner, str) else None


def _verdict(first: int, second: int, forward: Asked[Choice], backward: Asked[Choice]) -> PairVerdict:
    turned = None if backward.value is None else _TURNED[backward.value]
    return PairVerdict(first, second, (forward.value, turned), forward.failure or backward.failure)


def win_share(answer: int, pairs: Sequence[PairVerdict]) -> tuple[float | None, str | None]:
    """The answer's share of wins among its comparisons that were made, ties half; none where nothing was decided."""
    own = [pair for pair in pairs if answer in (pair.first, pair.second)]
    made = [pair for pair in own if pair.outcome != "missing"]
    won = sum(pair.outcome == ("first" if pair.first == answer else "second") for pair in made)
    ties = sum(pair.outcome == "tie" for pair in made)
    if ties < len(made):
        return (won + ties / 2) / len(made), None
    return None, TIED if made else next((pair.missing for pair in own if pair.missing), TIED)
