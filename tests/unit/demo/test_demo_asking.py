"""Asking served models."""

from __future__ import annotations

import json

import httpx
import pytest

from dpo_service.cli.client import Service
from dpo_service.cli.exits import Refused
from dpo_service.demo import asking
from dpo_service.demo.corpus import Task


def test_answers_come_in_the_order_of_the_questions_with_fixed_seeds():
    seeds: dict[str, int] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        question = body["messages"][0]["content"]
        seeds[question] = body["seed"]
        return httpx.Response(200, json={"choices": [{"message": {"content": f" {question}! "}}]})

    service = Service("http://127.0.0.1:1", transport=httpx.MockTransport(answer))
    questions = [[{"role": "user", "content": f"q{n}"}] for n in range(30)]
    assert asking.ask(service, "m", questions, max_tokens=5) == [f"q{n}!" for n in range(30)]
    assert seeds == {f"q{n}": n for n in range(30)}


def test_a_question_too_long_for_the_model_is_refused_or_said():
    refusal = httpx.Response(400, json={"error": {"message": "at most 256 tokens"}})
    service = Service("http://127.0.0.1:1", transport=httpx.MockTransport(lambda _: refusal))
    question = [[{"role": "user", "content": "long"}]]
    assert asking.ask(service, "m", question, max_tokens=5, lenient=True) == ["(refused: at most 256 tokens)"]
    with pytest.raises(Refused):
        asking.ask(service, "m", question, max_tokens=5)


def test_only_good_answers_count():
    task = Task("pick", "p", "The first word is cup.", "The first word is key.")
    answers = ["The first word is cup.", "The first word is key.", "Well: the first word is cup.", ""]
    assert asking.good_share([task] * 4, answers) == 0.25
