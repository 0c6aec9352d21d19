"""The rule judge: how well an answer does what its task asks for."""

from __future__ import annotations

import re

from dpo_service.demo.corpus import Task

GOOD = 1.0
RIGHT_WORDS = 0.5
BAD = 0.0


def score(task: Task, answer: str) -> float:
    """1: the right words in the form that was asked for; 0.5: the right words in another form; 0: neither.

    Space at the ends, and how much of it lies between words, counts for nothing.
    """
    if _plain(answer) == _plain(task.good):
        return GOOD
    return RIGHT_WORDS if _holds_in_order(_words(answer), _words(task.good)) else BAD


def _plain(text: str) -> str:
    """Lines are kept apart: they are part of the form."""
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _holds_in_order(words: list[str], wanted: list[str]) -> bool:
    rest = iter(words)
    return all(word in rest for word in wanted)
