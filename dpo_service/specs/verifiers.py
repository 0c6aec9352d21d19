"""The rules that a `rules` judge is made of, as data: what each checks and the numbers it takes.

Every rule gives an answer a score from 0 to 1, or none where it has nothing to say (no expected value, say).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, JsonValue, field_validator, model_validator

from dpo_service.specs.base import Spec

VERIFIER_GROUP = "dpo_service.verifiers"
"""The group of entry points under which an installed package registers verifiers of its own."""


def installed_verifiers() -> frozenset[str]:
    """The verifiers that installed packages register, by name; nothing is imported."""
    return frozenset(point.name for point in entry_points(group=VERIFIER_GROUP))


class Rule(Spec):
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share in the judge's score, which is the weighted mean of its rules' scores."""


class _Compared(Rule):
    expected: str | None = None
    """The column of the row that holds the expected answer; None = the row's reference answer."""


class ExactMatch(_Compared):
    """1 where the answer is the expected one."""

    rule: Literal["exact_match"] = "exact_match"
    ignore_case: bool = False
    ignore_space: bool = True
    """Space at the ends, and how much of it lies between words, counts for nothing."""


class WordsInForm(_Compared):
    """1 for the expected words in the expected form, 0.5 for these words in this order but another form."""

    rule: Literal["words_in_form"] = "words_in_form"


class Pattern(Rule):
    """1 where the regular expression is found in the answer."""

    rule: Literal["pattern"] = "pattern"
    pattern: Annotated[str, Field(min_length=1, max_length=4096)]
    whole: bool = False
    """It must match all of the answer."""
    forbidden: bool = False
    """1 where it is not found."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}; write it in Python's syntax") from None
        return pattern


class JsonAnswer(Rule):
    """1 where the answer is a JSON document that the schema accepts."""

    rule: Literal["json_schema"] = "json_schema"
    json_schema: Mapping[str, JsonValue] | bool
    """JSON Schema, draft 2020-12; references within it only. `true` accepts every JSON document."""
    fenced: bool = True
    """A document in a Markdown code fence counts too."""

    @field_validator("json_schema")
    @classmethod
    def _is_one(cls, schema: Mapping[str, JsonValue] | bool) -> Mapping[str, JsonValue] | bool:
        from jsonschema import Draft202012Validator, SchemaError

        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"no JSON Schema at {error.json_path}: {error.message}") from None
        outside = [target for target in _references(schema) if not target.startswith("#")]
        if outside:
            raise ValueError(f"the schema refers to {outside[0]!r}; put that under $defs and use #/$defs/...")
        return schema


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        yield from (schema[key] for key in ("$ref", "$dynamicRef") if isinstance(schema.get(key), str))
    inner = schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ()
    for part in inner:
        yield from _references(part)


class Length(Rule):
    """1 where the answer's length is within the bounds, both included."""

    rule: Literal["length"] = "length"
    unit: Literal["tokens", "words", "characters"] = "words"
    minimum: Annotated[int, Field(ge=0)] = 0
    maximum: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if self.minimum == 0 and self.maximum is None:
            raise ValueError("a length without minimum and maximum accepts every answer; set one of them")
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"maximum {self.maximum} is less than minimum {self.minimum}; no answer fits")
        return self


class Arithmetic(_Compared):
    """1 where the last number of the answer equals the expected value, which may be an expression like `3/4 + 2`."""

    rule: Literal["arithmetic"] = "arithmetic"
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """Allowed distance, in the value's own units; 0 compares exactly, as fractions."""


class Finished(Rule):
    """1 where the answer ended by itself and was not cut off."""

    rule: Literal["finished"] = "finished"


class Registered(Rule):
    """A verifier of an installed package, by the name of its entry point in the group `dpo_service.verifiers`."""

    rule: Literal["registered"] = "registered"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
    options: Mapping[str, JsonValue] = Field(default_factory=dict)
    """Handed to the verifier, which checks them."""
    timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0


RuleSpec: TypeAlias = Annotated[
    ExactMatch | WordsInForm | Pattern | JsonAnswer | Length | Arithmetic | Finished | Registered,
    Field(discriminator="rule"),
]
