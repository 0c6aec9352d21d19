"""The lists of the online demo, and what its job's rules say of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_service.cli.jobfile import load
from dpo_service.demo.lists import LONGEST, WANTED, generate, prompt_rows, supervised_rows
from dpo_service.demo.words import NOUNS
from dpo_service.online.judges.port import Answer, JudgeRequest
from dpo_service.online.judges.rules import RulesJudge
from dpo_service.specs.judge import RulesJudgeSpec

CONFIGS = Path(__file__).parents[3] / "configs"
SPEC = RulesJudgeSpec.model_validate(load(CONFIGS / "demo-online.yaml")["judge"])


@pytest.fixture(scope="module")
def made():
    return generate(600, 100, 50)


async def scores(*texts):
    verdict = await RulesJudge(SPEC).judge(JudgeRequest("p", tuple(Answer(text) for text in texts)))
    return list(verdict.scores)


def listed(*words):
    return f" {', '.join(words)}."


def test_no_prompt_is_in_two_parts(made):
    parts = [prompt for prompt, _ in made.supervised], made.prompts, made.held_out
    assert [len(part) for part in parts] == [600, 100, 50]
    assert len({prompt for part in parts for prompt in part}) == 750


def test_the_same_seed_gives_the_same_lists(made):
    assert generate(600, 100, 50) == made
    assert generate(600, 100, 50, seed=1) != made


def test_rows_are_what_the_service_reads(made):
    prompt, answer = made.supervised[0]
    asked = {"role": "user", "content": prompt}
    assert next(supervised_rows(made)) == {"messages": [asked, {"role": "assistant", "content": answer}]}
    assert [row["messages"][0]["content"] for row in prompt_rows(made.prompts)] == list(made.prompts)


async def test_ten_different_words_are_all_that_is_wanted():
    assert await scores(listed(*NOUNS[:WANTED])) == [1.0]


async def test_more_words_are_better_up_to_ten():
    counted = await scores(*(listed(*NOUNS[:count]) for count in range(1, 13)))
    assert counted[:10] == sorted(set(counted[:10]))
    assert counted[10] == counted[11] < counted[9]


async def test_a_word_twice_another_form_and_no_list_are_worse():
    ten = NOUNS[:WANTED]
    best, twice, no_end, chain, nothing = await scores(
        listed(*ten), listed(*ten[:-1], ten[0]), listed(*ten)[:-1], f" There is a {' and a '.join(ten)}.", "."
    )
    assert best > twice > 0.5
    assert best > no_end > 0.5
    assert chain == nothing == 0


async def test_the_supervised_answers_leave_room(made):
    """They are what the policy begins with: far from the best, and none of them as good as is wanted."""
    of_answers = await scores(*(answer for _, answer in made.supervised))
    assert 0.15 < sum(of_answers) / len(of_answers) < 0.25
    assert max(of_answers) == (await scores(listed(*NOUNS[:LONGEST])))[0] < 0.75
