"""Verdicts that are kept: what is asked once, what is asked again."""

from dataclasses import replace

import pytest

from dpo_service.online.judges.build import Surroundings, build_judge
from dpo_service.online.judges.cache import VerdictFile, key_of
from dpo_service.online.judges.port import Answer, JudgeRequest, Usage
from dpo_service.specs.judge import PairwiseJudgeSpec
from tests.unit.online.judges.openai_kit import PAIR, prefers_good, status


@pytest.fixture
async def judged(server, tmp_path):
    """Each call is a judge of its own, as another process would have it, on the same file."""

    async def ask(request=PAIR, model="m", **fields):
        endpoint = {"base_url": server.url, "model": model, "limits": {"attempts": 1}}
        spec = PairwiseJudgeSpec.model_validate({"endpoint": endpoint, **fields})
        judge = build_judge(spec, Surroundings(cache_file=tmp_path / "cache" / "verdicts.sqlite")).judge
        try:
            return await judge.judge(request)
        finally:
            await judge.close()

    return ask


async def test_what_is_known_is_not_asked_again(server, judged):
    first = await judged()
    again = await judged(replace(PAIR, prompt_token_ids=(1, 2), row={"line": 7}))
    assert len(server.bodies) == 2
    assert again == replace(first, cached=True, usage=Usage(), seconds=again.seconds)


async def test_another_question_is_another_entry(server, judged):
    await judged()
    for request in (
        replace(PAIR, prompt="other"),
        replace(PAIR, answers=PAIR.answers[::-1]),
        replace(PAIR, answers=(PAIR.answers[0], Answer("bad", finished=False))),
        replace(PAIR, reference="r"),
    ):
        assert not (await judged(request)).cached
    assert not (await judged(model="n")).cached
    assert not (await judged(rubric="other")).cached
    assert not (await judged(cache=False)).cached


async def test_a_tie_is_kept_and_a_failure_is_not(server, judged):
    server.script('{"winner": "A"}')
    assert (await judged()).missing == ("tie", "tie")
    assert (await judged()).cached
    other = replace(PAIR, prompt="other")
    server.script(status(400))
    assert (await judged(other)).missing == ("refused", "refused")
    server.answer = prefers_good
    mended = await judged(other)
    assert (mended.cached, mended.scores) == (False, (1.0, 0.0))


async def test_a_file_that_is_broken_costs_verdicts_and_not_the_job(server, judged, tmp_path):
    await judged()
    file = tmp_path / "cache" / "verdicts.sqlite"
    damaged = VerdictFile(file)
    damaged._connection.execute("UPDATE verdicts SET verdict = '{'")
    damaged.close()
    assert (await judged()).scores == (1.0, 0.0)
    assert (await judged()).cached
    file.write_bytes(b"no database" * 1000)
    assert (await judged()).scores == (1.0, 0.0)


def test_a_key_is_the_content_whatever_the_order_of_a_messages_fields():
    one = JudgeRequest(({"role": "user", "content": "a"},), PAIR.answers)
    other = JudgeRequest(({"content": "a", "role": "user"},), PAIR.answers)
    assert key_of("d", one) == key_of("d", other) != key_of("e", one)
    assert key_of("d", one) != key_of("d", replace(one, prompt="a"))
