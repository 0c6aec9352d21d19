"""The comparing judge against a real server: both orders, ties, replies that cannot be read."""

import itertools

import pytest

from dpo_service.online.judges.build import Surroundings, build_judge
from dpo_service.online.judges.pairwise import read_choice
from dpo_service.online.judges.port import Answer, Judge, JudgeRequest
from dpo_service.specs.judge import PairwiseJudgeSpec
from tests.unit.online.judges.openai_kit import PAIR, prefers_good, shown, status


@pytest.fixture
async def verdict_on(server):
    """Judges a request with the server's help."""
    judges = []

    async def ask(request=PAIR, endpoint=(), **fields):
        endpoint = {"base_url": server.url, "model": "judge-1", "limits": {"attempts": 1}, **dict(endpoint)}
        spec = PairwiseJudgeSpec.model_validate({"endpoint": endpoint, **fields})
        judges.append(build_judge(spec, Surroundings()).judge)
        return await judges[-1].judge(request)

    yield ask
    for judge in judges:
        await judge.close()


async def test_both_orders_are_asked_and_agree(server, verdict_on):
    verdict = await verdict_on()
    assert sorted(shown(body) for body in server.bodies) == [["bad", "good"], ["good", "bad"]]
    assert (verdict.scores, verdict.between(0, 1), verdict.between(1, 0)) == ((1.0, 0.0), "first", "second")
    assert verdict.pairs[0].orders == ("first", "first")
    assert (verdict.usage.calls, verdict.usage.prompt_tokens, verdict.usage.completion_tokens) == (2, 200, 20)
    assert len(verdict.replies) == 2
    assert verdict.complete


async def test_a_judge_that_goes_by_position_makes_a_tie_and_no_score(server, verdict_on):
    server.script('{"winner": "A"}')
    verdict = await verdict_on()
    assert verdict.pairs[0].flipped
    assert (verdict.scores, verdict.missing, verdict.between(0, 1)) == ((None, None), ("tie", "tie"), "tie")
    assert verdict.complete


async def test_a_tie_in_one_order_only_is_a_tie_but_no_flip(server, verdict_on):
    server.script('{"winner": "A"}', '{"winner": "tie"}')
    verdict = await verdict_on()
    assert verdict.between(0, 1) == "tie"
    assert not verdict.pairs[0].flipped


async def test_a_reply_that_cannot_be_read_is_asked_for_again_with_its_own_words(server, verdict_on):
    def stammers(body):
        return "The first, I think" if len(body["messages"]) == 2 else prefers_good(body)

    server.answer = stammers
    verdict = await verdict_on()
    assert verdict.scores == (1.0, 0.0)
    assert verdict.usage.calls == len(server.bodies) == 4
    repaired = [body["messages"] for body in server.bodies if len(body["messages"]) == 4]
    assert [said["role"] for said in repaired[0]] == ["system", "user", "assistant", "user"]
    assert repaired[0][2]["content"] == "The first, I think"


async def test_a_judge_that_never_makes_sense_is_asked_twice_and_gives_no_score(server, verdict_on):
    server.script("no idea")
    verdict = await verdict_on()
    assert len(server.bodies) == 4
    assert (verdict.scores, verdict.missing) == ((None, None), ("unreadable", "unreadable"))
    assert verdict.between(0, 1) == "missing"
    assert not verdict.complete


async def test_one_order_without_a_reply_is_no_verdict(server, verdict_on):
    server.answer = lambda body: status(400) if shown(body)[0] == "bad" else prefers_good(body)
    verdict = await verdict_on()
    assert verdict.pairs[0].orders == ("first", None)
    assert (verdict.between(0, 1), verdict.missing) == ("missing", ("refused", "refused"))


async def test_of_several_answers_every_pair_is_asked_and_scores_are_shares_of_wins(server, verdict_on):
    request = JudgeRequest("p", tuple(Answer("x" * size) for size in (1, 3, 3, 4)))
    verdict = await verdict_on(request)
    assert len(server.bodies) == 12
    assert verdict.scores == pytest.approx((0, 0.5, 0.5, 1))
    assert [(pair.first, pair.second) for pair in verdict.pairs] == list(itertools.combinations(range(4), 2))


async def test_a_failed_comparison_does_not_count_against_an_answer(server, verdict_on):
    server.answer = lambda body: status(400) if set(shown(body)) == {"x", "xxx"} else prefers_good(body)
    verdict = await verdict_on(JudgeRequest("p", (Answer("x"), Answer("xx"), Answer("xxx"))))
    assert verdict.scores == (0.0, 0.5, 1.0)
    assert not verdict.complete


async def test_the_endpoint_is_held_to_the_form_as_far_as_it_can_be(server, verdict_on):
    for structured in ("json_schema", "json_object", "text"):
        await verdict_on(endpoint={"structured": structured})
    formats = [body.get("response_format") for body in server.bodies[::2]]
    assert formats[0]["json_schema"]["schema"]["properties"]["winner"]["enum"] == ["A", "B", "tie"]
    assert formats[1:] == [{"type": "json_object"}, None]


async def test_what_is_sent_is_what_the_job_says(server, verdict_on):
    endpoint = {"temperature": None, "limit_name": "max_completion_tokens", "max_tokens": 77}
    request = JudgeRequest(
        ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}),
        (Answer("because"), Answer("bec", finished=False)),
        reference="for that reason",
    )
    await verdict_on(request, endpoint, rubric="The longer the better.", show_reference=True)
    body = server.bodies[0]
    assert (body["model"], body["max_completion_tokens"]) == ("judge-1", 77)
    assert not {"temperature", "max_tokens"} & set(body)
    system, asked = (message["content"] for message in body["messages"])
    assert "The longer the better." in system
    for part in ("system: Be brief.", "user: Why?", "because", "breaks off", "for that reason"):
        assert part in asked


async def test_the_reference_answer_is_not_shown_unasked(server, verdict_on):
    await verdict_on(JudgeRequest("p", PAIR.answers, reference="secret"))
    assert "secret" not in str(server.bodies)


async def test_it_is_a_judge_and_its_digest_that_of_what_is_asked(server):
    def judge(rubric=None, **endpoint):
        endpoint = {"base_url": server.url, "model": "m", **endpoint}
        built = build_judge(PairwiseJudgeSpec.model_validate({"endpoint": endpoint, "rubric": rubric}), Surroundings())
        return built.judge

    one = judge()
    assert isinstance(one, Judge)
    assert one.digest == judge(limits={"attempts": 2}, price={"prompt": 1, "completion": 2}).digest
    assert len({one.digest, judge("other").digest, judge(model="n").digest, judge(temperature=1).digest}) == 4


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ('{"winner": "A"}', "first"),
        ('Sure!\n```json\n{"reason": "a {b} \\" c", "winner": "b"}\n```\nHope it helps', "second"),
        ('<think>{"winner": "B"}</think> {"winner": "A"}', "first"),
        ('thought without a beginning {"winner": "B"} </think>{"winner": "Tie"}', "tie"),
        ('{"winner": "A"} no, wait: {"winner": "B"}', "second"),
        ('{"reason": {"winner": "A"}}', None),
        ('{"winner": ["A"]}', None),
        ('{"winner": "C"}', None),
        ('{"winner": "A"', None),
        ("A", None),
        ("", None),
    ],
)
def test_choices_are_found_where_they_stand(text, choice):
    assert read_choice(text) == choice
