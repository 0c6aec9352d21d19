"""Asking a language model: the one function behind which an endpoint, a served model and the policy itself stand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpo_service.online.judges.port import Usage


@dataclass(frozen=True)
class Said:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class ChatRequest:
    messages: tuple[Said, ...]
    temperature: float | None = 0.0
    """None = the model's own."""
    max_tokens: int = 1024
    json_schema: Mapping[str, Any] | None = None
    """What the reply must be, where the model can be held to it."""
    sample: int = 0
    """Which one of several replies to the same messages; for whoever samples by a seed."""


@dataclass(frozen=True)
class Completion:
    text: str
    usage: Usage


Complete = Callable[[ChatRequest], Awaitable[Completion]]
"""One reply to one request.

It raises JudgeCallFailed where this call failed, and JudgeError where none can succeed.
"""
