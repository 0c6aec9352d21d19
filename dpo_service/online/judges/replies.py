"""Reading what a language model replied: JSON wherever it stands in the text, and scores written as asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_THOUGHT = re.compile(r"<think>.*?</think>|\A.*?</think>", re.DOTALL | re.IGNORECASE)
_SCORE = re.compile(r"\bscore\b\W{0,8}?(-?\d+(?:\.\d+)?)(?:\s*/\s*\d+)?", re.IGNORECASE)
_DECODER = json.JSONDecoder()


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in `text`, the outermost ones, whatever stands around them; what a model thought is left out."""
    text = _THOUGHT.sub("", text)
    at = text.find("{")
    while at >= 0:
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if isinstance(value, dict):
                yield value
        at = text.find("{", end)


def field(text: str, name: str) -> Any:
    """The value of the field `name` in the last JSON object of `text` that has it; None = there is none."""
    values = [found[name] for found in json_objects(text) if name in found]
    return values[-1] if values else None


def number_between(value: Any, least: float, most: float) -> float | None:
    """`value` as a number within the bounds, both included; None = it is none. Text that is a number counts."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if least <= number <= most else None


def written_score(text: str, least: float, most: float) -> float | None:
    """The number after the last `Score:` of `text`; None = there is none within the bounds."""
    found = _SCORE.findall(_THOUGHT.sub("", text))
    return number_between(found[-1], least, most) if found else None
