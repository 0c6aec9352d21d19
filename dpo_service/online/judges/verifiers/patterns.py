"""Whether a regular expression is found in an answer, within a second."""

from __future__ import annotations

import regex

from dpo_service.errors import JudgeCallFailed
from dpo_service.online.judges.port import Answer, JudgeRequest
from dpo_service.online.judges.verifiers.port import Verifier
from dpo_service.specs.verifiers import Pattern

LONGEST_SECONDS = 1.0
"""A pattern that takes longer on one answer backtracks without end, for all that is known."""


def pattern(spec: Pattern) -> Verifier:
    # Not `re`: an answer can make a pattern backtrack for hours, and only this one can be given a limit.
    compiled = regex.compile(spec.pattern)
    search = compiled.fullmatch if spec.whole else compiled.search

    def check(answer: Answer, request: JudgeRequest) -> float | None:
        try:
            found = search(answer.text, timeout=LONGEST_SECONDS) is not None
        except TimeoutError:
            raise JudgeCallFailed(
                f"the pattern {spec.pattern!r} took over {LONGEST_SECONDS:g} s", reason="timeout", passing=False
            ) from None
        return 1.0 if found != spec.forbidden else 0.0

    return check
