"""What a policy's answers to held-out prompts are worth: by score, by comparison, and what gets no score."""

from __future__ import annotations

import pytest

from dpo_service.errors import TrainingError
from dpo_service.online.evaluation import NO_REFERENCE, Question, evaluate
from dpo_service.online.judges.port import TIED, PairVerdict, Verdict
from dpo_service.online.port import Sample, Synced, Weights
from dpo_service.online.prompts import PromptRow
from dpo_service.specs.sampling import SamplingSpec
from tests.unit.online.curator_kit import ScriptedSampler

PROMPTS = [PromptRow(index, (index, index), f"prompt {index}", f"own {index}", {"level": index}) for index in range(6)]


def question(n=1, **options):
    return Question(SamplingSpec(n=n, max_tokens=8), 3, lambda ids: " ".join(map(str, ids)), **options)


class Scores:
    """The score of an answer is its first token's number; `missing` says for which rows there is none, and why."""

    name, digest = "scores", "d"

    def __init__(self, missing=None):
        self.requests, self.missing = [], missing or {}

    async def judge(self, request):
        self.requests.append(request)
        why = self.missing.get(request.row["level"])
        scores = tuple(None if why else float(answer.token_ids[1]) for answer in request.answers)
        return Verdict(self.name, scores, (why,) * len(scores))

    async def close(self): ...


class Prefers:
    """Compares two answers: by row it prefers the sampled one, the row's own, or neither."""

    name, digest = "prefers", "d"

    def __init__(self, *said):
        self.said, self.first = said, []

    async def judge(self, request):
        sampled = next(place for place, answer in enumerate(request.answers) if answer.token_ids)
        self.first.append(sampled == 0)
        said = self.said[request.row["level"]]
        if said == "tie":
            return Verdict(self.name, (None, None), (TIED, TIED), (PairVerdict(0, 1, ("tie", "tie")),))
        winner = sampled if said == "sampled" else 1 - sampled
        return Verdict(self.name, tuple(float(place == winner) for place in range(2)))

    async def close(self): ...


async def test_the_reward_is_the_mean_score_of_every_answer():
    judge, sampler = Scores(), ScriptedSampler()
    made = await evaluate(sampler, judge, PROMPTS, question(n=3, chunk=4))
    assert (made.reward, made.finished, made.tokens, made.judge.verdicts) == (1.0, 1.0, 3.0, 6)
    assert [one.prompt.index for one in made.answers] == [row for row in range(6) for _ in range(3)]
    assert made.report() == {"valid/reward": 1.0, "valid/finished_share": 1.0, "valid/answer_tokens": 3.0}
    assert {request.reference for request in judge.requests} == {f"own {n}" for n in range(6)}


async def test_a_prompt_is_asked_with_the_same_seed_whoever_asks():
    first, second = ScriptedSampler(), ScriptedSampler()
    await evaluate(first, None, PROMPTS, question())
    await evaluate(second, Scores(), PROMPTS[3:], question(n=2, chunk=1))
    assert first.prompts[3:] == second.prompts
    assert len({prompt.seed for prompt in first.prompts}) == 6


async def test_what_failed_is_counted_and_no_score():
    made = await evaluate(ScriptedSampler(), Scores({1: "timeout", 4: None, 5: "abstained"}), PROMPTS, question(n=3))
    assert made.report() == {
        "valid/reward": 1.0,
        "valid/finished_share": 1.0,
        "valid/answer_tokens": 3.0,
        "valid/missing/abstained": 3.0,
        "valid/missing/timeout": 3.0,
    }
    nothing = await evaluate(ScriptedSampler(), Scores(dict.fromkeys(range(6), "timeout")), PROMPTS, question())
    assert nothing.reward is None
    assert "valid/reward" not in nothing.report()


async def test_without_a_judge_there_is_no_reward():
    made = await evaluate(ScriptedSampler(), None, PROMPTS, question())
    assert made.report() == {"valid/finished_share": 1.0, "valid/answer_tokens": 3.0}


async def test_a_judge_that_compares_gives_the_share_won_of_what_was_decided():
    judge = Prefers("sampled", "own", "sampled", "tie", "sampled", "sampled")
    rows = [*PROMPTS[:5], PromptRow(5, (5, 5), "prompt 5", None, {"level": 5})]
    made = await evaluate(ScriptedSampler(), judge, rows, question(against_own=True))
    assert [one.score for one in made.answers] == [1.0, 0.0, 1.0, None, 1.0, None]
    assert made.reward == 3 / 4
    assert made.missing == {TIED: 1, NO_REFERENCE: 1}
    assert len(judge.first) == 5
    assert set(judge.first) == {True, False}, "neither is always shown first"


async def test_equal_ranks_are_a_tie():
    class Equal(Prefers):
        async def judge(self, request):
            return Verdict(self.name, (0.5, 0.5))

    made = await evaluate(ScriptedSampler(), Equal(), PROMPTS[:2], question(against_own=True))
    assert (made.reward, made.missing) == (None, {TIED: 2})


async def test_answers_of_two_policies_are_no_evaluation():
    class Moving(ScriptedSampler):
        async def sample(self, prompts, options):
            await self.sync(Weights(self.current + 1, "full", "", ""))
            return await super().sample(prompts, options)

        async def sync(self, weights):
            self.current = weights.version
            return Synced(weights.version, 0.0, 0.0)

    with pytest.raises(TrainingError, match="other weights"):
        await evaluate(Moving(), None, PROMPTS, question(chunk=2))
    assert isinstance((await evaluate(Moving(), None, PROMPTS, question(chunk=9))).answers[0].sample, Sample)
