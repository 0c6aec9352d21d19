"""Which files a method can use, and a file's rows as the method reads them."""

from __future__ import annotations

from dataclasses import replace

from dpo_service.errors import InvalidData
from dpo_service.rows.formats import Format, normalise
from dpo_service.rows.row import Json, Row, Text
from dpo_service.specs.method import PROMPT_KINDS, RowKind

REFERENCE_COLUMNS = ("answer", "reference")
"""Where a row of a prompt alone may hold the answer that verifiers compare with, or SPIN trains on."""
_NAMED = frozenset(["messages", "conversations", "system", "prompt", "completion", "chosen", "rejected", "tools"])


def rows_of(row: Json, line: int, expected: Format) -> list[Row]:
    """`normalise`, and as the method reads it: a pair may be two unpaired answers, or a prompt."""
    built = normalise(row, line, expected)
    if expected.rows in PROMPT_KINDS:
        return [_prompt(row, built, trained=expected.rows == "demonstrations")]
    if expected.rows != "unpaired" or len(built.answers) == 1:
        return [built]
    plain = built.plain or (None, None, None)
    return [
        replace(built, answers=(answer,), label=label, plain=(plain[0], text) if plain[0] and text else None)
        for answer, label, text in zip(built.answers, (1.0, 0.0), plain[1:], strict=True)
    ]


def _prompt(row: Json, built: Row, *, trained: bool) -> Row:
    """The row's prompt, with its good answer (of a pair the chosen one) as reference; `trained` on, it is an answer."""
    good = built.answers[0] if built.answers and not _undesirable(built) else _own_answer(row, built)
    reference = None if good is None else _text(good)
    if trained and (good is None or not reference):
        raise InvalidData(
            "the row has no answer that samples could be measured against; give `answer`, or remove the row",
            line=built.line,
        )
    return replace(
        built,
        answers=(good,) if trained and good is not None else (),
        label=None,
        tie=False,
        plain=built.plain[: 2 if trained else 1] if built.plain else None,
        reference=reference,
        columns=_others(row),
    )


def _undesirable(built: Row) -> bool:
    return len(built.answers) == 1 and built.label == 0


def _own_answer(row: Json, built: Row) -> Text | None:
    value = next((row[column] for column in REFERENCE_COLUMNS if row.get(column) is not None), None)
    if value is None or built.answers:
        return None
    text = value if isinstance(value, str) else str(value)
    return [{"role": "assistant", "content": text}] if built.conversational else text


def _text(answer: Text) -> str:
    return answer if isinstance(answer, str) else str(answer[-1].get("content") or "")


def _others(row: Json) -> Json:
    """The columns that no format reads; those of `metadata` count as the row's own, unless it has them itself."""
    given = row.get("metadata")
    metadata = given if isinstance(given, dict) else {}
    own = {name: value for name, value in row.items() if name not in _NAMED and value is not None}
    return {**metadata, **own}


def usable(found: RowKind, rows: RowKind) -> bool:
    """Whether a method that takes `rows` can use a file of kind `found`: a pair is also two unpaired answers, every row
    has a prompt, and a demonstration is an answer that someone found good."""
    if rows == "prompts":
        return True
    if rows == "demonstrations":
        return found != "unpaired"
    return found == rows or (found, rows) == ("pairs", "unpaired")


def as_kind(found: Format, rows: RowKind) -> Format:
    """The format as a method reads it that takes `rows`.

    Raises:
        InvalidData: it cannot use files of this format.
    """
    if usable(found.rows, rows):
        return replace(found, rows=rows)
    if rows == "unpaired":
        raise InvalidData(
            f"this file has no labels ({found.title}); method 'kto' needs prompt, completion and label (true or "
            "false), or messages and label; or pairs, whose chosen answers are desirable and the rejected ones not"
        )
    if rows == "pairs":
        kind = "single answers" if found.rows == "answers" else "rows without a preference between two answers"
        other = {"answers": "supervised", "unpaired": "kto"}.get(found.rows)
        hint = f" (or train it with method {other!r})" if other else ""
        raise InvalidData(
            f"this is a file of {kind} ({found.title}); this method needs pairs: prompt, chosen and rejected, or "
            f"OpenAI's input, preferred_output and non_preferred_output{hint}"
        )
    if rows == "demonstrations":
        raise InvalidData(
            f"this file says of answers whether they are good ({found.title}), and method 'spin' needs one good answer "
            "a prompt: give `messages` that end with it, or `prompt` and `completion`, without labels"
        )
    raise InvalidData(
        f"this file has no single answer per prompt ({found.title}); method 'supervised' needs `messages` that end "
        "with the assistant's answer, or `prompt` and `completion`"
    )
