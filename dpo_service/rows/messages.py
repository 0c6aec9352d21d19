"""Conversations: lists of messages with a role and a content, checked and brought to one shape."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import orjson

from dpo_service.errors import InvalidData

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


def is_conversation(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, dict) for item in value)


def messages(value: object, column: str, line: int) -> list[Message]:
    """`value` as a list of messages. OpenAI (`role`, `content`) and ShareGPT (`from`, `value`) names are understood.

    Raises:
        InvalidData: it is no list of messages, a role is unknown, a content is missing or is no text.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise InvalidData(f"`{column}` must be a list of messages with `role` and `content`, and not empty", line=line)
    return [_message(item, f"{column}[{number}]", line) for number, item in enumerate(value)]


def _message(item: object, where: str, line: int) -> Message:
    if not isinstance(item, dict):
        raise InvalidData(f"`{where}` must be a message with `role` and `content`", line=line)
    item = {key: value for key, value in item.items() if value is not None}
    if "from" in item and "role" not in item:
        item = {"role": SHAREGPT_ROLES.get(str(item["from"]), item["from"]), "content": item.get("value")}
    role = item.get("role")
    if role not in ROLES:
        raise InvalidData(f"`{where}` has the unknown role {role!r}; use one of {', '.join(ROLES)}", line=line)
    content = item.get("content")
    if content is None and not (role == "assistant" and (item.get("tool_calls") or item.get("function_call"))):
        raise InvalidData(f"`{where}` has no `content`; give its text", line=line)
    if content is not None:
        item["content"] = _text(content, where, line)
    return item


def _text(content: object, where: str, line: int) -> str:
    """The content as one string; OpenAI's list of text parts is joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise InvalidData(
        f"`{where}.content` is no text; only text can be trained on (no images, audio or files)", line=line
    )


def prompt_messages(value: object, column: str, line: int) -> list[Message]:
    """A conversation that an answer can follow.

    Raises:
        InvalidData: as `messages`, or the last message is the assistant's.
    """
    conversation = messages(value, column, line)
    if conversation[-1]["role"] == "assistant":
        raise InvalidData(
            f"the last message of `{column}` is the assistant's; it must be the one to be answered, so end with the "
            "user's message (or a tool's result)",
            line=line,
        )
    return conversation


def answer_messages(value: object, column: str, line: int) -> list[Message]:
    """What the assistant says: its messages, with tool results between them allowed.

    Raises:
        InvalidData: as `messages`, or another role speaks, or nothing is said.
    """
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    conversation = messages(value, column, line)
    for message in conversation:
        if message["role"] not in ("assistant", "tool", "function"):
            raise InvalidData(
                f"`{column}` has a message of role {message['role']!r}; an answer holds the assistant's messages only, "
                "and both answers of a pair must continue the same conversation",
                line=line,
            )
    if conversation[0]["role"] != "assistant" or conversation[-1]["role"] != "assistant":
        raise InvalidData(f"`{column}` must begin and end with a message of the assistant", line=line)
    if not any(_says_something(message) for message in conversation if message["role"] == "assistant"):
        raise InvalidData(f"`{column}` is empty; give the answer's text or remove the row", line=line)
    return conversation


def _says_something(message: Message) -> bool:
    return bool(message.get("content", "").strip() or message.get("tool_calls") or message.get("function_call"))


def parse_tool_arguments(conversation: Sequence[Message]) -> list[Message]:
    """OpenAI writes a call's arguments as JSON text; chat templates expect the object, and so does serving."""
    return [
        {**m, "tool_calls": [_call(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m for m in conversation
    ]


def _call(call: Message) -> Message:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = orjson.loads(function["arguments"])
    except orjson.JSONDecodeError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def hh_turns(text: str) -> list[Message]:
    """A dialogue as HH-RLHF writes it: each turn after an empty line and its speaker's name."""
    pieces = re.split(r"\n\n(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]


def tools_of(value: object, line: int) -> list[Message] | None:
    """The tools column: a list of objects, or that list as JSON text.

    Raises:
        InvalidData: it is something else.
    """
    if value is None or value == [] or value == "":
        return None
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise InvalidData("`tools` is a text that is not JSON; give a list of tools", line=line) from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InvalidData("`tools` must be a list of tools, each an object", line=line)
    return value or None
