"""The formats a training file may have, as one table; each row is recognised by its columns and brought to a `Row`.

A file holds one format: that of its first row. Columns that no format knows (`id`, `source`, ...) are let pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_service.errors import InvalidData
from dpo_service.rows import pair_formats
from dpo_service.rows.messages import (
    answer_messages,
    is_conversation,
    messages,
    parse_tool_arguments,
    prompt_messages,
    tools_of,
)
from dpo_service.rows.row import Json, Row, Text, required_text, with_system
from dpo_service.specs.method import RowKind


@dataclass(frozen=True)
class Format:
    """A row of the table of formats. The first format whose columns are there and whose values match is the one."""

    name: str
    title: str
    rows: RowKind
    """What it holds or, once a method reads it, what that takes it for (`kinds.as_kind`)."""
    columns: frozenset[str]
    matches: Callable[[Json], bool]
    build: Callable[[Json, int], Row]


def recognise(row: Json, line: int) -> Format:
    """The format of a row.

    Raises:
        InvalidData: no format has these columns; says which one is nearest and what is missing.
    """
    columns = _columns(row)
    _refuse_old_names(columns, line)
    for candidate in FORMATS:
        if candidate.columns <= columns and candidate.matches(row):
            if columns & _PAIR_COLUMNS - candidate.columns:
                break
            return candidate
    raise _unrecognised(columns, line)


def normalise(row: Json, line: int, expected: Format) -> Row:
    """The row of a file whose format is `expected`.

    Raises:
        InvalidData: a column is missing, the row has another format, or its values cannot be trained on.
    """
    columns = _columns(row)
    if not expected.columns <= columns or not expected.matches(row):
        _refuse_old_names(columns, line)
        raise _unexpected(row, columns, line, expected)
    built = expected.build(row, line)
    if len(built.answers) == 2 and _same(*built.answers):
        raise InvalidData("chosen and rejected are equal, so the pair prefers nothing; remove the row", line=line)
    judged = row.get("chosen_probability") if len(built.answers) == 2 else None
    return built if judged is None else replace(built, label=_probability(judged, line))


def _columns(row: Json) -> set[str]:
    return {column for column, value in row.items() if value is not None}


def _refuse_old_names(columns: set[str], line: int) -> None:
    old = sorted(columns & {"preferred_completion", "non_preferred_completion"})
    if old:
        raise InvalidData(
            f"`{old[0]}` is an old name; rename `preferred_completion` to `preferred_output` and "
            "`non_preferred_completion` to `non_preferred_output`",
            line=line,
        )


def _unrecognised(columns: set[str], line: int) -> InvalidData:
    pairs = [candidate for candidate in FORMATS if candidate.rows == "pairs"]
    nearest = max(pairs, key=lambda f: (len(f.columns & columns & _PAIR_COLUMNS), -len(f.columns - columns)))
    found = _listed(sorted(columns)) if columns else "none"
    if not nearest.columns & columns & _PAIR_COLUMNS:
        return InvalidData(
            f"the columns ({found}) are none of the known formats; a pair has prompt, chosen and rejected, or OpenAI's "
            "input, preferred_output and non_preferred_output; a supervised row has messages, or prompt and "
            "completion, an unpaired one a label beside them, and a prompt to sample answers to is `prompt` alone",
            line=line,
        )
    missing = _listed(sorted(nearest.columns - columns))
    return InvalidData(f"the row has no {missing} (it has {found}); add it or remove the row", line=line)


def _unexpected(row: Json, columns: set[str], line: int, expected: Format) -> InvalidData:
    missing = sorted(expected.columns - columns)
    incomplete = InvalidData(f"the row has no {_listed(missing)}; add it or remove the row", line=line)
    try:
        found = recognise(row, line)
    except InvalidData as error:
        return incomplete if missing else error
    if missing and found.columns <= expected.columns:
        return incomplete
    return InvalidData(
        f"this row is in another format ({found.title}) than the rows before it ({expected.title}); a file holds one "
        "format, so convert the row or upload two files",
        line=line,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:8])


def _same(first: Text, second: Text) -> bool:
    if isinstance(first, str) and isinstance(second, str):
        return first.strip() == second.strip()
    return first == second


def _probability(value: object, line: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidData("`chosen_probability` must be a number from 0 to 1", line=line)
    return float(value)


# --- single answers


def _supervised(column: str) -> Callable[[Json, int], Row]:
    def build(row: Json, line: int) -> Row:
        conversation = messages(row["messages"], column, line) if column == "messages" else with_system(row, line)
        if conversation[-1]["role"] != "assistant":
            raise InvalidData(f"the last message of `{column}` must be the assistant's: the answer to learn", line=line)
        if conversation[-1].get("weight") == 0:
            raise InvalidData(
                f"the last message of `{column}` has weight 0, so the row teaches nothing; remove it", line=line
            )
        if len(conversation) == 1:
            raise InvalidData(f"`{column}` has an answer only; put the user's message before it", line=line)
        prompt = prompt_messages(parse_tool_arguments(conversation[:-1]), column, line)
        answer = parse_tool_arguments(answer_messages(conversation[-1:], column, line))
        return Row(line, prompt, (answer,), tools_of(row.get("tools"), line))

    return build


def _completion(row: Json, line: int) -> Row:
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return Row(line, required_text(row, "prompt", line), (required_text(row, "completion", line),))
    prompt = prompt_messages(row["prompt"], "prompt", line)
    return Row(
        line, prompt, (answer_messages(row["completion"], "completion", line),), tools_of(row.get("tools"), line)
    )


def _unpaired(row: Json, line: int) -> Row:
    if not isinstance(row["label"], bool) and row["label"] not in (0, 1):
        raise InvalidData("`label` must be true (desirable) or false (undesirable)", line=line)
    built = _completion(row, line) if row.get("completion") is not None else _supervised("messages")(row, line)
    return replace(built, label=float(row["label"]))


# --- prompts, whose answers are sampled


def _prompt_only(row: Json, line: int) -> Row:
    if isinstance(row["prompt"], str):
        return Row(line, required_text(row, "prompt", line), ())
    return Row(line, prompt_messages(row["prompt"], "prompt", line), (), tools_of(row.get("tools"), line))


def _messages_only(row: Json, line: int) -> Row:
    prompt = parse_tool_arguments(prompt_messages(row["messages"], "messages", line))
    return Row(line, prompt, (), tools_of(row.get("tools"), line))


# --- the table


def _always(_row: Json) -> bool:
    return True


def _is_hh(row: Json) -> bool:
    return all(isinstance(row[c], str) and row[c].startswith("\n\nHuman:") for c in ("chosen", "rejected"))


def _any_list(*columns: str) -> Callable[[Json], bool]:
    return lambda row: any(isinstance(row[column], list | dict) for column in columns)


def _no_list(*columns: str) -> Callable[[Json], bool]:
    return lambda row: not any(isinstance(row[column], list | dict) for column in columns)


def _is_ultrafeedback(row: Json) -> bool:
    """The prompt as text, and both whole conversations."""
    return isinstance(row["prompt"], str) and all(
        is_conversation(row[c]) and row[c][0].get("role") != "assistant" for c in ("chosen", "rejected")
    )


def _awaits_an_answer(row: Json) -> bool:
    turns = row["messages"]
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, dict) and last.get("role") in ("user", "tool", "function")


def _format(name: str, title: str, rows: RowKind, columns: str, matches: Any, build: Any) -> Format:
    return Format(name, title, rows, frozenset(columns.split()), matches, build)


_OPENAI = "input preferred_output non_preferred_output"
_TRL = "prompt chosen rejected"
FORMATS = (
    _format("openai_preference", "OpenAI preference", "pairs", _OPENAI, _always, pair_formats.openai),
    _format("sharegpt", "ShareGPT pairs", "pairs", "conversations chosen rejected", _always, pair_formats.sharegpt),
    _format("ultrafeedback", "UltraFeedback", "pairs", _TRL, _is_ultrafeedback, pair_formats.implicit_conversation),
    _format(
        "trl_conversations",
        "conversations",
        "pairs",
        _TRL,
        _any_list("prompt", "chosen", "rejected"),
        pair_formats.conversational,
    ),
    _format(
        "trl_text",
        "prompt, chosen, rejected as text",
        "pairs",
        _TRL,
        _no_list("prompt", "chosen", "rejected"),
        pair_formats.text_pair,
    ),
    _format("hh_text", "HH-RLHF text", "pairs", "chosen rejected", _is_hh, pair_formats.hh),
    _format(
        "implicit_conversations",
        "chosen, rejected as conversations",
        "pairs",
        "chosen rejected",
        _any_list("chosen", "rejected"),
        pair_formats.implicit_conversation,
    ),
    _format(
        "implicit_text",
        "chosen, rejected as text",
        "pairs",
        "chosen rejected",
        _no_list("chosen", "rejected"),
        pair_formats.implicit_text,
    ),
    _format(
        "unpaired", "unpaired: prompt, completion, label", "unpaired", "prompt completion label", _always, _unpaired
    ),
    _format("unpaired_messages", "unpaired: messages, label", "unpaired", "messages label", _always, _unpaired),
    _format("prompt_messages", "prompts as conversations", "prompts", "messages", _awaits_an_answer, _messages_only),
    _format("openai_chat", "OpenAI chat", "answers", "messages", _always, _supervised("messages")),
    _format("prompt_completion", "prompt, completion", "answers", "prompt completion", _always, _completion),
    _format("sharegpt_chat", "ShareGPT", "answers", "conversations", _always, _supervised("conversations")),
    _format("prompt_only", "prompts without answers", "prompts", "prompt", _always, _prompt_only),
)
BY_NAME = {known.name: known for known in FORMATS}
_PAIR_COLUMNS = frozenset(["input", "preferred_output", "non_preferred_output", "chosen", "rejected"])
