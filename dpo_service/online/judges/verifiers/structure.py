"""Whether an answer is a JSON document that a schema accepts."""

from __future__ import annotations

import json
import re

from jsonschema import Draft202012Validator
from referencing import Registry

from dpo_service.online.judges.port import Answer, JudgeRequest
from dpo_service.online.judges.verifiers.port import Verifier
from dpo_service.specs.verifiers import JsonAnswer

_FENCE = re.compile(r"\A\s*```(?:json)?[ \t]*\n(.*)\n\s*```\s*\Z", re.DOTALL)


def json_answer(spec: JsonAnswer) -> Verifier:
    schema = spec.json_schema if isinstance(spec.json_schema, bool) else dict(spec.json_schema)
    # An empty registry: a reference that leads out of the schema fails, and is never fetched.
    validator = Draft202012Validator(schema, registry=Registry())

    def check(answer: Answer, request: JudgeRequest) -> float | None:
        fenced = _FENCE.match(answer.text) if spec.fenced else None
        try:
            document = json.loads(fenced[1] if fenced else answer.text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0 if validator.is_valid(document) else 0.0

    return check


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is Python's, not JSON")
