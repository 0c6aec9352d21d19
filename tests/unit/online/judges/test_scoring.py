"""Scores, rankings and the policy's own five points, from a real server's replies."""

import json
import statistics

import pytest

from dpo_service.errors import JudgeCallFailed
from dpo_service.online.judges.build import Surroundings, build_judge
from dpo_service.online.judges.chat import Completion
from dpo_service.online.judges.port import Answer, JudgeRequest, Usage
from dpo_service.online.judges.scoring import read_ranks, read_score
from dpo_service.specs.judge import LimitsSpec, ScoringJudgeSpec, SelfRewardingJudgeSpec
from tests.unit.online.judges.openai_kit import shown, status

THREE = JudgeRequest("p", (Answer("xx"), Answer("xxxx"), Answer("x")))


@pytest.fixture
async def verdict_on(server):
    judges = []

    async def ask(request=THREE, temperature=0.5, **fields):
        endpoint = {"base_url": server.url, "model": "m", "temperature": temperature, "limits": {"attempts": 1}}
        spec = ScoringJudgeSpec.model_validate({"endpoint": endpoint, **fields})
        judges.append(build_judge(spec, Surroundings()).judge)
        return await judges[-1].judge(request)

    yield ask
    for judge in judges:
        await judge.close()


async def test_each_answer_is_scored_by_itself(server, verdict_on):
    server.answer = lambda body: f'{{"reason": "its length", "score": {len(shown(body)[0])}}}'
    verdict = await verdict_on()
    assert verdict.scores == (2, 4, 1)
    assert verdict.usage.calls == 3


async def test_the_score_is_the_median_of_the_samples(server, verdict_on):
    said = {"xx": [1, 9, 2], "xxxx": [7, 7, 10], "x": [3, 3, 3]}
    left = {text: list(scores) for text, scores in said.items()}
    server.answer = lambda body: f'{{"score": {left[shown(body)[0]].pop()}}}'
    assert (await verdict_on(samples=3)).scores == tuple(statistics.median(scores) for scores in said.values())


async def test_scores_out_of_bounds_are_no_scores(server, verdict_on):
    server.answer = lambda body: f'{{"score": {[0, 11][len(shown(body)[0]) > 1]}}}'
    verdict = await verdict_on()
    assert verdict.scores == (None, None, None)
    assert verdict.missing == ("unreadable",) * 3


async def test_without_over_half_of_the_samples_there_is_no_score(server, verdict_on):
    left = {"xx": ["400", "5", "400"], "xxxx": ["400", "5", "6"], "x": ["5", "5", "5"]}

    def answer(body):
        reply = left[shown(body)[0]].pop()
        return status(400) if reply == "400" else f'{{"score": {reply}}}'

    server.answer = answer
    verdict = await verdict_on(samples=3)
    assert (verdict.scores, verdict.missing) == ((None, 5.5, 5), ("refused", None, None))


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("score", {"score": {"type": "integer", "enum": list(range(1, 11))}}),
        ("ranking", {"ranking": {"type": "array", "items": {"type": "string", "enum": ["A", "B", "C"]}}}),
    ],
)
async def test_the_endpoint_is_held_to_the_form(server, verdict_on, mode, wanted):
    server.script('{"score": 5, "ranking": ["A", "B", "C"]}')
    await verdict_on(mode=mode)
    form = server.bodies[0]["response_format"]["json_schema"]
    assert form["strict"]
    assert form["schema"] == {
        "type": "object",
        "properties": {"reason": {"type": "string"}, **wanted},
        "required": ["reason", *wanted],
        "additionalProperties": False,
    }


def longest_first(body):
    answers = shown(body)
    order = sorted(range(len(answers)), key=lambda place: -len(answers[place]))
    return json.dumps({"ranking": [chr(ord("A") + place) for place in order]})


async def test_rankings_show_all_answers_in_turned_order_and_are_averaged(server, verdict_on):
    server.answer = longest_first
    verdict = await verdict_on(mode="ranking", samples=3)
    assert verdict.scores == (0.5, 1.0, 0.0)
    assert sorted(shown(body) for body in server.bodies) == sorted(
        [["xx", "xxxx", "x"], ["xxxx", "x", "xx"], ["x", "xx", "xxxx"]]
    )


async def test_a_ranking_by_position_alone_comes_out_level(server, verdict_on):
    server.script('{"ranking": ["A", "B", "C"]}')
    assert (await verdict_on(mode="ranking", samples=3)).scores == pytest.approx((0.5, 0.5, 0.5))


async def test_a_ranking_that_leaves_an_answer_out_is_none(server, verdict_on):
    server.script('{"ranking": ["A", "B"]}')
    verdict = await verdict_on(mode="ranking", temperature=0)
    assert (verdict.scores, verdict.missing) == ((None,) * 3, ("unreadable",) * 3)


def test_readers():
    assert read_ranks('{"ranking": ["answer b", "C", "A"]}', [2, 0, 1]) == (1.0, 0.5, 0.0)
    assert read_ranks('{"ranking": ["A", "A", "B"]}', [0, 1, 2]) is None
    assert read_score('{"score": "7"}') == 7
    assert read_score("**Score:** 8/10") == 8
    assert read_score('{"score": true}') is None


class Policy:
    """The sampler as the loop hands it over: a function, here one that says what it is told."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.asked = []

    async def __call__(self, request):
        self.asked.append(request)
        reply = self.replies.pop(0)
        if reply is None:
            raise JudgeCallFailed("no room", reason="timeout", passing=True)
        return Completion(reply, Usage(1, 50, 5))


async def self_judged(policy, samples, *texts, attempts=1):
    spec = SelfRewardingJudgeSpec(samples=samples, limits=LimitsSpec(attempts=attempts))
    judge = build_judge(spec, Surroundings(policy=policy)).judge
    return await judge.judge(JudgeRequest("Why?", tuple(Answer(text) for text in texts)))


async def test_the_policy_scores_itself_and_its_samples_are_averaged():
    policy = Policy("It is fine.\nScore: 3", "Score: <4>", "**Score: 5**", "Score: 0", "score: 1/5", "Score: 0.5")
    verdict = await self_judged(policy, 3, "one", "two")
    assert verdict.scores == (4.0, 0.5)
    assert verdict.usage == Usage(6, 300, 30)
    question = policy.asked[0].messages[0].content
    assert all(part in question for part in ("Why?", "one", "Score:", "100 words"))
    assert policy.asked[0].temperature == 0.7


async def test_a_sampler_that_fails_for_a_moment_is_asked_again():
    verdict = await self_judged(Policy(None, "Score: 2"), 1, "one", attempts=2)
    assert verdict.scores == (2,)


async def test_a_policy_that_gives_no_score_is_asked_once_more_and_then_has_none():
    verdict = await self_judged(
        Policy("lovely", "Score: 2", "lovely", "very", None, "Score: 6", "Score: 6"), 1, *"abcd"
    )
    assert verdict.scores.count(None) == 3
    assert verdict.scores.count(2) == 1
    assert sorted(filter(None, verdict.missing)) == ["timeout", "unreadable", "unreadable"]
