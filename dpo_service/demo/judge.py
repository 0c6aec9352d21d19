"""The rule judge: how well an answer does what its task asks for."""

from __future__ import annotations

from dpo_service.demo.corpus import Task
from dpo_service.online.judges.verifiers.matching import RIGHT, RIGHT_WORDS, WRONG, form_score

GOOD = RIGHT
BAD = WRONG
__all__ = ["BAD", "GOOD", "RIGHT_WORDS", "score"]


def score(task: Task, answer: str) -> float:
    """1: the right words in the form that was asked for; 0.5: the right words in another form; 0: neither."""
    return form_score(task.good, answer)
