"""Pydantic's findings as a sentence for the user, with the dotted field, and the option that was perhaps meant."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

Finding = Mapping[str, Any]
FINDINGS_SHOWN = 3


def describe(findings: Sequence[Finding], model: Any = None) -> tuple[str | None, str]:
    """The field of the first finding, and a sentence about the first few. `model` is the type of the request body."""
    by_field: dict[str | None, str] = {}
    for finding in findings:
        param = _field(finding, model)
        by_field.setdefault(param, _sentence(finding, param, model, _alternatives(findings, param, model)))
    more = len(by_field) - FINDINGS_SHOWN
    text = "; ".join(list(by_field.values())[:FINDINGS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    return next(iter(by_field), None), text or "the request is not valid"


def _sentence(finding: Finding, param: str | None, model: Any, auto: bool) -> str:
    kind, message = str(finding["type"]), str(finding["msg"])
    match kind:
        case "json_invalid":
            reason = finding.get("ctx", {}).get("error", message)
            return f"the body is no valid JSON: {reason} (at character {finding['loc'][-1]})"
        case "extra_forbidden":
            return _unknown_option(finding, param, model)
        case "missing":
            return f"`{param}` is missing" if param else "the request needs a body: a JSON object"
        case "value_error" | "assertion_error":
            reason = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
            return f"`{param}`: {reason}" if param else reason
        case "model_attributes_type" | "model_type" | "dict_type" if param is None:
            return "the body must be a JSON object, sent with content-type: application/json"
        case "model_attributes_type" | "model_type" | "dict_type":
            owner = _model_in(_type_at(model, _path(finding)))
            fields = f" with the fields {', '.join(owner.model_fields)}" if owner else ""
            return f"`{param}` must be an object{fields}"
    wanted = message.removeprefix("Input ").rstrip(".") + (' or be "auto"' if auto else "")
    return f"`{param}` {wanted}" if param else wanted


def _unknown_option(finding: Finding, param: str | None, model: Any) -> str:
    loc = _path(finding)
    owner = _model_in(_type_at(model, loc[:-1]))
    known = list(owner.model_fields) if owner else []
    near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6)
    if near:
        hint = f"; did you mean `{'.'.join([*map(str, loc[:-1]), near[0]])}`?"
    else:
        hint = f"; known are: {', '.join(known)}" if known else ""
    return f"unknown option `{param}`{hint}"


def _alternatives(findings: Sequence[Finding], param: str | None, model: Any) -> bool:
    """Whether the field could also have been "auto"."""
    return any(
        f["type"] == "literal_error" and "auto" in str(f.get("ctx", {}).get("expected")) and _field(f, model) == param
        for f in findings
    )


def _path(finding: Finding) -> list[Any]:
    """The location without the part of the request it lies in."""
    loc = list(finding["loc"])
    return loc[1:] if loc and loc[0] in ("body", "query", "path", "header") else loc


def _field(finding: Finding, model: Any) -> str | None:
    """The dotted field: the location without what names a branch of a union rather than a field."""
    loc = _path(finding)
    if finding["type"] == "json_invalid" or not loc:
        return None
    if finding["type"] == "extra_forbidden" or finding["loc"][0] != "body" or model is None:
        return ".".join(map(str, loc))
    names: list[str] = []
    kind = model
    for part in loc:
        inner = _step(kind, part)
        if inner is None and not (finding["type"] == "missing" and part is loc[-1]):
            continue
        names.append(str(part))
        kind = inner
    return ".".join(names) or None


def _type_at(kind: Any, path: Sequence[Any]) -> Any:
    for part in path:
        kind = _step(kind, part) or kind
    return kind


def _step(kind: Any, part: Any) -> Any:
    """The type of field (or item) `part` of type `kind`, or None."""
    for option in _options(kind):
        if isinstance(option, type) and issubclass(option, BaseModel) and part in option.model_fields:
            return option.model_fields[part].annotation
        arguments = get_args(option)
        if isinstance(part, int) and arguments:
            return arguments[0]
        if get_origin(option) is dict and isinstance(part, str):
            return arguments[1]
    return None


def _options(kind: Any) -> list[Any]:
    """The branches of a union, annotations taken off."""
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [option for branch in get_args(kind) for option in _options(branch)]
    return [kind]


def _model_in(kind: Any) -> type[BaseModel] | None:
    found = [o for o in _options(kind) if isinstance(o, type) and issubclass(o, BaseModel)]
    return found[0] if found else None
