"""One row of a training file, whatever the file looked like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpo_service.errors import InvalidData
from dpo_service.rows.messages import Message, messages

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

    reference: str | None = None
    """Of a prompt whose answers are sampled: the file's own answer, as text."""
    columns: Json | None = None
    """... and the row's other columns, for those who judge."""

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def required_text(row: Json, column: str, line: int) -> str:
    """Raises InvalidData where the column holds no text, or an empty one."""
    value = row[column]
    if not isinstance(value, str):
        raise InvalidData(f"`{column}` must be a text, found {type(value).__name__}", line=line)
    if not value.strip():
        mend = "give the prompt" if column == "prompt" else "give the answer's text"
        raise InvalidData(f"`{column}` is empty; {mend} or remove the row", line=line)
    return value


def with_system(row: Json, line: int) -> list[Message]:
    """ShareGPT's `conversations`, with the system prompt that has a column of its own."""
    conversation = messages(row["conversations"], "conversations", line)
    system = row.get("system")
    return (
        [{"role": "system", "content": system}, *conversation] if isinstance(system, str) and system else conversation
    )
