"""The formats of pairs: each builder brings a row of its file to a `Row` with two answers."""

from __future__ import annotations

from dpo_service.errors import InvalidData
from dpo_service.rows.messages import (
    Message,
    answer_messages,
    hh_turns,
    messages,
    parse_tool_arguments,
    prompt_messages,
    tools_of,
)
from dpo_service.rows.row import Json, Row, required_text, with_system


def openai(row: Json, line: int) -> Row:
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


def conversational(row: Json, line: int) -> Row:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": required_text(row, "prompt", line)}]
    conversation = prompt_messages(prompt, "prompt", line)
    answers = [_after(conversation, row[column], column, line) for column in ("chosen", "rejected")]
    return Row(line, conversation, tuple(answers), tools_of(row.get("tools"), line), _tie(row))


def _after(conversation: list[Message], value: object, column: str, line: int) -> list[Message]:
    """The answer; some files repeat the whole prompt in front of it."""
    size = len(conversation)
    if isinstance(value, list) and len(value) > size and value[:size] == conversation:
        value = value[size:]
    return answer_messages(value, column, line)


def text_pair(row: Json, line: int) -> Row:
    answers = required_text(row, "chosen", line), required_text(row, "rejected", line)
    return Row(line, required_text(row, "prompt", line), answers, tie=_tie(row))


def sharegpt(row: Json, line: int) -> Row:
    conversation = prompt_messages(with_system(row, line), "conversations", line)
    answers = tuple(answer_messages(row[column], column, line) for column in ("chosen", "rejected"))
    return Row(line, conversation, answers, tools_of(row.get("tools"), line), _tie(row))


def implicit_conversation(row: Json, line: int) -> Row:
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


def implicit_text(row: Json, line: int) -> Row:
    """The shared beginning is the prompt; the space before the first difference goes to the answers (as in TRL)."""
    chosen, rejected = required_text(row, "chosen", line), required_text(row, "rejected", line)
    if chosen.strip() == rejected.strip():
        raise InvalidData("chosen and rejected are equal, so the pair prefers nothing; remove the row", line=line)
    shorter = min(len(chosen), len(rejected))
    cut = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    if cut and chosen[cut - 1] == " ":
        cut -= 1
    if not chosen[:cut].strip():
        raise InvalidData("chosen and rejected share no beginning, so there is no prompt; add `prompt`", line=line)
    return Row(line, chosen[:cut], (chosen[cut:], rejected[cut:]), tie=_tie(row))


def hh(row: Json, line: int) -> Row:
    """Anthropic's HH-RLHF: the whole dialogue as text, twice."""
    texts = required_text(row, "chosen", line), required_text(row, "rejected", line)
    turns = [hh_turns(text) for text in texts]
    built = _from_shared(turns[0], turns[1], row, line)
    cut = texts[0].rindex("\n\nAssistant:") + len("\n\nAssistant:")
    shared = texts[1].startswith(texts[0][:cut]) and all(len(answer) == 1 for answer in built.answers)
    plain = (texts[0][:cut], texts[0][cut:], texts[1][cut:]) if shared else None
    return Row(line, built.prompt, built.answers, tie=built.tie, plain=plain)


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
