"""What a verifier is: a function of one answer and its request (the prompt, the reference answer, the row's columns).

A package brings its own by an entry point that names a factory, here `make` of the module `ours`:

    [project.entry-points."dpo_service.verifiers"]
    compiles = "ours:make"

    def make(options):                                   # the job's options; ValueError where one cannot be used
        return lambda answer, request: 1.0 if ... else 0.0

A job then asks for it by `{rule: registered, name: compiles}`. It is called on threads, several at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dpo_service.online.judges.port import Answer, JudgeRequest


class Verifier(Protocol):
    def __call__(self, answer: Answer, request: JudgeRequest) -> float | None:
        """The answer's score, 0 to 1; None = nothing can be said of it."""
        ...


VerifierFactory = Callable[[Mapping[str, Any]], Verifier]
"""What an entry point of the group `dpo_service.verifiers` names: makes a verifier from a job's options.

It raises ValueError where it cannot use an option; the sentence is shown to the user.
"""


def expected_of(request: JudgeRequest, column: str | None) -> str | None:
    """The expected answer: the row's reference answer, or what `column` of the row holds; None = there is none."""
    value = request.reference if column is None else request.row.get(column)
    return None if value is None else str(value)
