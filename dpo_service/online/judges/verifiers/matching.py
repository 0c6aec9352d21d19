"""Text against text: equal, the same words in the same form, a length."""

from __future__ import annotations

import re

from dpo_service.online.judges.port import Answer, JudgeRequest
from dpo_service.online.judges.verifiers.port import Verifier, expected_of
from dpo_service.specs.verifiers import ExactMatch, Length, WordsInForm

RIGHT = 1.0
RIGHT_WORDS = 0.5
WRONG = 0.0


def exact_match(spec: ExactMatch) -> Verifier:
    def brought_to_form(text: str) -> str:
        text = plain(text) if spec.ignore_space else text
        return text.casefold() if spec.ignore_case else text

    def check(answer: Answer, request: JudgeRequest) -> float | None:
        expected = expected_of(request, spec.expected)
        if expected is None:
            return None
        return RIGHT if brought_to_form(answer.text) == brought_to_form(expected) else WRONG

    return check


def words_in_form(spec: WordsInForm) -> Verifier:
    def check(answer: Answer, request: JudgeRequest) -> float | None:
        expected = expected_of(request, spec.expected)
        return None if expected is None else form_score(expected, answer.text)

    return check


def form_score(expected: str, answer: str) -> float:
    """1: the expected words in the expected form; 0.5: these words, in order, in another form; 0: neither.

    Space at the ends, and how much of it lies between words, counts for nothing.
    """
    if plain(answer) == plain(expected):
        return RIGHT
    return RIGHT_WORDS if _holds_in_order(_words(answer), _words(expected)) else WRONG


def plain(text: str) -> str:
    """Without needless space. Lines are kept apart: they are part of the form."""
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _holds_in_order(words: list[str], wanted: list[str]) -> bool:
    rest = iter(words)
    return all(word in rest for word in wanted)


def length(spec: Length) -> Verifier:
    def check(answer: Answer, request: JudgeRequest) -> float | None:
        if spec.unit == "tokens":
            # An answer that did not come from the sampler has no tokens, which says nothing of its length.
            size = len(answer.token_ids) if answer.token_ids or not answer.text else None
        else:
            size = len(answer.text.split()) if spec.unit == "words" else len(answer.text)
        if size is None:
            return None
        return RIGHT if spec.minimum <= size and (spec.maximum is None or size <= spec.maximum) else WRONG

    return check
