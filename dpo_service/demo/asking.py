"""Asking served models, several questions at once, through /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dpo_service.cli.client import Service
from dpo_service.cli.exits import Refused
from dpo_service.demo.corpus import Task
from dpo_service.demo.judge import GOOD, score

AT_ONCE = 8
TEMPERATURE = 0.7

Message = dict[str, Any]


def ask(
    service: Service, model: str, conversations: Sequence[list[Message]], *, max_tokens: int, lenient: bool = False
) -> list[str]:
    """One sampled answer to each conversation, in order. Question n has seed n, so both models get the same dice.

    Lenient: where a question is refused (it is too long for the model), the reason stands for the answer.
    """

    def one(number: int) -> str:
        body = {"model": model, "messages": conversations[number], "seed": number}
        body |= {"temperature": TEMPERATURE, "max_tokens": max_tokens}
        try:
            answer = service.post("/v1/chat/completions", body)
        except Refused as error:
            if not lenient or error.status != 400:
                raise
            return f"(refused: {error})"
        return str(answer["choices"][0]["message"]["content"] or "").strip()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, range(len(conversations))))


def good_share(tasks: Sequence[Task], answers: Sequence[str]) -> float:
    """Share of answers the rule judge finds good."""
    return sum(score(task, answer) == GOOD for task, answer in zip(tasks, answers, strict=True)) / len(tasks)
