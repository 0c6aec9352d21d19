"""The formats a training file may have, as one table; each row is recognised by its columns and brought to a `Row`.

A file holds one format: that of its first row. Columns that no format knows (`id`, `source`, ...) are let pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_service.errors import InvalidData
from dpo_service.rows.messages import (
    Message,
    answer_messages,
    hh_turns,
    is_conversation,
    messages,
    parse_tool_arguments,
    prompt_messages,
    tools_of,
)
from dpo_service.specs.method import RowKind

Json = dict[str, Any]
Text = str | list[Message]
"""Plain text, or a conversation that a chat template renders."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training row, whatever its file looked like."""

    line: int
    prompt: Text
    answers: tuple[Text, ...]
    """(chosen, rejected) of a pair, or (answer,)."""
    tools: list[Message] | None = None
    tie: bool = False
    """The annotator marked both answers as equal."""
    label: float | None = None
    """An unpaired answer: 1 = desirable, 0 = undesirable. A pair: the judged probability that chosen wins."""
    plain: tuple[str, ...] | None = None
    """The row as text (prompt, *answers), for a model without a chat template. Only formats that are text have it."""

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass(frozen=True)
class Format:
    """A row of the table of formats. The first format whose columns are there and whose values match is the one."""

    name: str
    title: str
    rows: RowKind | None
    """What methods can use it; None = no method of this version."""
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
            "completion, and an unpaired one a label beside them",
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


def _string(row: Json, column: str, line: int) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise InvalidData(f"`{column}` must be a text, found {type(value).__name__}", line=line)
    if not value.strip():
        mend = "give the prompt" if column == "prompt" else "give the answer's text"
        raise InvalidData(f"`{column}` is empty; {mend} or remove the row", line=line)
    return value


def _probability(value: object, line: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidData("`chosen_probability` must be a number from 0 to 1", line=line)
    return float(value)


def _tie(row: Json) -> bool:
    """Columns in which annotators say how sure they were."""
    margin = row.get("margin")
    if isinstance(margin, int | float) and not isinstance(margin, bool) and margin == 0:
        return True
    for first, second in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        scores = row.get(first), row.get(second)
        if scores[0] is not None and scores[0] == scores[1]:
            return True
    return False


# --- pairs


def _openai(row: Json, line: int) -> Row:
    given = row["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise InvalidData("`input` must be an object with `messages`", line=line)
    prompt = prompt_messages(given["messages"], "input.messages", line)
    answers = [answer_messages(row[column], column, line) for column in ("preferred_output", "non_preferred_output")]
    return Row(
        line,
        parse_tool_arguments(prompt),
        tuple(parse_tool_arguments(answer) for answer in answers),
        tools_of(given.get("tools"), line),
        _tie(row),
    )


def _conversational(row: Json, line: int) -> Row:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": _string(row, "prompt", line)}]
    conversation = prompt_messages(prompt, "prompt", line)
    answers = [_after(conversation, row[column], column, line) for column in ("chosen", "rejected")]
    return Row(line, conversation, tuple(answers), tools_of(row.get("tools"), line), _tie(row))


def _after(conversation: list[Message], value: object, column: str, line: int) -> list[Message]:
    """The answer; some files repeat the whole prompt in front of it."""
    size = len(conversation)
    if isinstance(value, list) and len(value) > size and value[:size] == conversation:
        value = value[size:]
    return answer_messages(value, column, line)


def _text_pair(row: Json, line: int) -> Row:
    answers = _string(row, "chosen", line), _string(row, "rejected", line)
    return Row(line, _string(row, "prompt", line), answers, tie=_tie(row))


def _sharegpt(row: Json, line: int) -> Row:
    conversation = prompt_messages(_with_system(row, line), "conversations", line)
    answers = tuple(answer_messages(row[column], column, line) for column in ("chosen", "rejected"))
    return Row(line, conversation, answers, tools_of(row.get("tools"), line), _tie(row))


def _with_system(row: Json, line: int) -> list[Message]:
    conversation = messages(row["conversations"], "conversations", line)
    system = row.get("system")
    return (
        [{"role": "system", "content": system}, *conversation] if isinstance(system, str) and system else conversation
    )


def _implicit_conversation(row: Json, line: int) -> Row:
    chosen, rejected = (messages(row[column], column, line) for column in ("chosen", "rejected"))
    return _from_shared(chosen, rejected, row, line)


def _from_shared(chosen: list[Message], rejected: list[Message], row: Json, line: int) -> Row:
    shared = 0
    # The last message of each is the answer, even where both are equal.
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise InvalidData("chosen and rejected share no first message, so there is no prompt; add `prompt`", line=line)
    prompt = prompt_messages(chosen[:shared], "chosen", line)
    answers = answer_messages(chosen[shared:], "chosen", line), answer_messages(rejected[shared:], "rejected", line)
    return Row(line, prompt, answers, tools_of(row.get("tools"), line), _tie(row))


def _implicit_text(row: Json, line: int) -> Row:
    """The shared beginning is the prompt; the space before the first difference goes to the answers (as in TRL)."""
    chosen, rejected = _string(row, "chosen", line), _string(row, "rejected", line)
    if chosen.strip() == rejected.strip():
        raise InvalidData("chosen and rejected are equal, so the pair prefers nothing; remove the row", line=line)
    shorter = min(len(chosen), len(rejected))
    cut = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    if cut and chosen[cut - 1] == " ":
        cut -= 1
    if not chosen[:cut].strip():
        raise InvalidData("chosen and rejected share no beginning, so there is no prompt; add `prompt`", line=line)
    return Row(line, chosen[:cut], (chosen[cut:], rejected[cut:]), tie=_tie(row))


def _hh(row: Json, line: int) -> Row:
    """Anthropic's HH-RLHF: the whole dialogue as text, twice."""
    texts = _string(row, "chosen", line), _string(row, "rejected", line)
    turns = [hh_turns(text) for text in texts]
    built = _from_shared(turns[0], turns[1], row, line)
    cut = texts[0].rindex("\n\nAssistant:") + len("\n\nAssistant:")
    shared = texts[1].startswith(texts[0][:cut]) and all(len(answer) == 1 for answer in built.answers)
    plain = (texts[0][:cut], texts[0][cut:], texts[1][cut:]) if shared else None
    return Row(line, built.prompt, built.answers, tie=built.tie, plain=plain)


# --- single answers


def _supervised(column: str) -> Callable[[Json, int], Row]:
    def build(row: Json, line: int) -> Row:
        conversation = messages(row["messages"], column, line) if column == "messages" else _with_system(row, line)
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
        return Row(line, _string(row, "prompt", line), (_string(row, "completion", line),))
    prompt = prompt_messages(row["prompt"], "prompt", line)
    return Row(
        line, prompt, (answer_messages(row["completion"], "completion", line),), tools_of(row.get("tools"), line)
    )


def _unpaired(row: Json, line: int) -> Row:
    if not isinstance(row["label"], bool) and row["label"] not in (0, 1):
        raise InvalidData("`label` must be true (desirable) or false (undesirable)", line=line)
    built = _completion(row, line) if row.get("completion") is not None else _supervised("messages")(row, line)
    return replace(built, label=float(row["label"]))


# --- recognised, for methods to come


def _prompt_only(row: Json, line: int) -> Row:
    if isinstance(row["prompt"], str):
        return Row(line, _string(row, "prompt", line), ())
    return Row(line, prompt_messages(row["prompt"], "prompt", line), (), tools_of(row.get("tools"), line))


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


def _format(name: str, title: str, rows: RowKind | None, columns: str, matches: Any, build: Any) -> Format:
    return Format(name, title, rows, frozenset(columns.split()), matches, build)


_OPENAI = "input preferred_output non_preferred_output"
_TRL = "prompt chosen rejected"
FORMATS = (
    _format("openai_preference", "OpenAI preference", "pairs", _OPENAI, _always, _openai),
    _format("sharegpt", "ShareGPT pairs", "pairs", "conversations chosen rejected", _always, _sharegpt),
    _format("ultrafeedback", "UltraFeedback", "pairs", _TRL, _is_ultrafeedback, _implicit_conversation),
    _format(
        "trl_conversations", "conversations", "pairs", _TRL, _any_list("prompt", "chosen", "rejected"), _conversational
    ),
    _format(
        "trl_text",
        "prompt, chosen, rejected as text",
        "pairs",
        _TRL,
        _no_list("prompt", "chosen", "rejected"),
        _text_pair,
    ),
    _format("hh_text", "HH-RLHF text", "pairs", "chosen rejected", _is_hh, _hh),
    _format(
        "implicit_conversations",
        "chosen, rejected as conversations",
        "pairs",
        "chosen rejected",
        _any_list("chosen", "rejected"),
        _implicit_conversation,
    ),
    _format(
        "implicit_text",
        "chosen, rejected as text",
        "pairs",
        "chosen rejected",
        _no_list("chosen", "rejected"),
        _implicit_text,
    ),
    _format(
        "unpaired", "unpaired: prompt, completion, label", "unpaired", "prompt completion label", _always, _unpaired
    ),
    _format("unpaired_messages", "unpaired: messages, label", "unpaired", "messages label", _always, _unpaired),
    _format("openai_chat", "OpenAI chat", "answers", "messages", _always, _supervised("messages")),
    _format("prompt_completion", "prompt, completion", "answers", "prompt completion", _always, _completion),
    _format("sharegpt_chat", "ShareGPT", "answers", "conversations", _always, _supervised("conversations")),
    _format("prompt_only", "prompts without answers", None, "prompt", _always, _prompt_only),
)
BY_NAME = {known.name: known for known in FORMATS}
_PAIR_COLUMNS = frozenset(["input", "preferred_output", "non_preferred_output", "chosen", "rejected"])
