"""Which verifiers there are: the built-in ones, and those that installed packages register by entry point.

A job names a verifier; it never names a module. What is not registered cannot be run.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from dpo_service.errors import InvalidSpec, JudgeError
from dpo_service.online.judges.port import Answer, JudgeRequest
from dpo_service.online.judges.verifiers.arithmetic import arithmetic
from dpo_service.online.judges.verifiers.matching import exact_match, length, words_in_form
from dpo_service.online.judges.verifiers.patterns import pattern
from dpo_service.online.judges.verifiers.port import Verifier
from dpo_service.online.judges.verifiers.structure import json_answer
from dpo_service.specs.verifiers import VERIFIER_GROUP, Finished, Registered, RuleSpec, installed_verifiers


def verifier_of(rule: RuleSpec) -> Verifier:
    """The verifier that a rule of a job asks for.

    Raises:
        InvalidSpec: no installed package registers it, or it refuses its options.
        JudgeError: a registered one cannot be imported.
    """
    if isinstance(rule, Registered):
        return _registered(rule)
    return _BUILT_IN[rule.rule](rule)


def finished(spec: Finished) -> Verifier:
    def check(answer: Answer, request: JudgeRequest) -> float | None:
        return 1.0 if answer.finished else 0.0

    return check


_BUILT_IN: dict[str, Callable[[Any], Verifier]] = {
    "exact_match": exact_match,
    "words_in_form": words_in_form,
    "pattern": pattern,
    "json_schema": json_answer,
    "length": length,
    "arithmetic": arithmetic,
    "finished": finished,
}


def _registered(rule: Registered) -> Verifier:
    points = entry_points(group=VERIFIER_GROUP, name=rule.name)
    if not points:
        known = ", ".join(sorted(installed_verifiers())) or "none"
        raise InvalidSpec(
            f"no installed package registers the verifier {rule.name!r} (registered: {known}); install the package on "
            "the machines of the cluster, or use a built-in rule",
            param="judge.rules",
        )
    try:
        factory = next(iter(points)).load()
    except Exception as error:
        raise JudgeError(f"the verifier {rule.name!r} cannot be imported: {error}") from error
    try:
        verifier: Verifier = factory(rule.options)
    except (ValueError, TypeError) as error:
        raise InvalidSpec(f"the verifier {rule.name!r} refuses its options: {error}", param="judge.rules") from None
    return verifier
