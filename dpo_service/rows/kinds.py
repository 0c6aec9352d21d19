"""Which files a method can use, and a file's rows as the method reads them."""

from __future__ import annotations

from dataclasses import replace

from dpo_service.errors import InvalidData
from dpo_service.rows.formats import Format, Json, Row, normalise
from dpo_service.specs.method import RowKind


def rows_of(row: Json, line: int, expected: Format) -> list[Row]:
    """`normalise`, and a pair as two unpaired answers where that is what the method reads."""
    built = normalise(row, line, expected)
    if expected.rows != "unpaired" or len(built.answers) == 1:
        return [built]
    plain = built.plain or (None, None, None)
    return [
        replace(built, answers=(answer,), label=label, plain=(plain[0], text) if plain[0] and text else None)
        for answer, label, text in zip(built.answers, (1.0, 0.0), plain[1:], strict=True)
    ]


def usable(found: RowKind, rows: RowKind) -> bool:
    """Whether a method that takes `rows` can use a file of kind `found`: a pair is also two unpaired answers."""
    return found == rows or (found, rows) == ("pairs", "unpaired")


def as_kind(found: Format, rows: RowKind) -> Format:
    """The format as a method reads it that takes `rows`.

    Raises:
        InvalidData: it cannot use files of this format.
    """
    if found.rows is not None and usable(found.rows, rows):
        return replace(found, rows=rows)
    if rows == "unpaired":
        raise InvalidData(
            f"this file has no labels ({found.title}); method 'kto' needs prompt, completion and label (true or "
            "false), or messages and label; or pairs, whose chosen answers are desirable and the rejected ones not"
        )
    if rows == "pairs":
        kind = "single answers" if found.rows == "answers" else "rows without a preference between two answers"
        other = {"answers": "supervised", "unpaired": "kto"}.get(found.rows or "")
        hint = f" (or train it with method {other!r})" if other else ""
        raise InvalidData(
            f"this is a file of {kind} ({found.title}); this method needs pairs: prompt, chosen and rejected, or "
            f"OpenAI's input, preferred_output and non_preferred_output{hint}"
        )
    raise InvalidData(
        f"this file has no single answer per prompt ({found.title}); method 'supervised' needs `messages` that end "
        "with the assistant's answer, or `prompt` and `completion`"
    )
