"""The generated corpus and its judge."""

from __future__ import annotations

import json

import pytest

from dpo_service.demo import judge
from dpo_service.demo.corpus import FAMILIES, Task, generate, preference_rows, supervised_rows, write_jsonl
from dpo_service.demo.story import N_HELD_OUT, N_PAIRS, N_SUPERVISED
from dpo_service.rows.check import check_file


@pytest.fixture(scope="module")
def corpus():
    return generate(N_SUPERVISED, N_PAIRS, N_HELD_OUT)


def test_the_parts_have_their_sizes_and_share_no_prompt(corpus):
    parts = (
        [prompt for prompt, _ in corpus.supervised],
        *([t.prompt for t in p] for p in (corpus.pairs, corpus.held_out)),
    )
    assert [len(part) for part in parts] == [N_SUPERVISED, N_PAIRS, N_HELD_OUT]
    assert len(set().union(*parts)) == sum(map(len, parts))


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another():
    assert generate(200, 50, 20, seed=3) == generate(200, 50, 20, seed=3)
    assert generate(200, 50, 20, seed=3) != generate(200, 50, 20, seed=4)


def test_half_of_the_supervised_answers_are_good(corpus):
    for asked, good in (("Greet", "Good morning"), ("Fill", "name:"), ("Make", "1."), ("Put", "[")):
        answers = [answer for prompt, answer in corpus.supervised if prompt.startswith(asked)]
        share = sum(answer.startswith(good) for answer in answers) / len(answers)
        assert 0.4 < share < 0.6


def test_every_family_is_held_out_too(corpus):
    assert {task.family for task in corpus.held_out} == set(FAMILIES)


def test_length_alone_decides_nothing(corpus):
    longer = sum(len(task.good) > len(task.bad) for task in corpus.pairs) / len(corpus.pairs)
    equal = sum(len(task.good) == len(task.bad) for task in corpus.pairs) / len(corpus.pairs)
    assert 0.35 < longer + equal / 2 < 0.65


def test_the_judge_tells_good_from_bad_in_every_pair(corpus):
    assert all(judge.score(task, task.good) == judge.GOOD for task in corpus.pairs)
    assert all(judge.score(task, task.bad) < judge.GOOD for task in corpus.pairs)


def test_the_judge_wants_words_and_form():
    task = Task("list", "Make a numbered list: cup, key", "1. cup\n2. key", "cup, key")
    assert judge.score(task, " 1.  cup\n2. key \n") == judge.GOOD
    assert judge.score(task, "1. cup 2. key") == judge.RIGHT_WORDS
    assert judge.score(task, "1. key\n2. cup") == judge.BAD
    assert judge.score(task, "") == judge.BAD


def test_asking_for_more_prompts_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr("dpo_service.demo.corpus.FAMILIES", {"one": lambda _: Task("one", "p", "g", "b")})
    with pytest.raises(ValueError, match="distinct prompts"):
        generate(5, 5, 5)


def test_the_service_takes_the_files_whole(corpus, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(corpus.pairs[:300]))
    write_jsonl(tmp_path / "answers.jsonl", supervised_rows(corpus))
    pairs = check_file(tmp_path / "pairs.jsonl", "pairs.jsonl", rows="pairs")
    answers = check_file(tmp_path / "answers.jsonl", "answers.jsonl", rows="answers")
    assert (pairs.kept, answers.kept) == (300, N_SUPERVISED)
    assert (pairs.contradictions, pairs.dropped) == (0, ())
    assert json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])["input"]["messages"]
