"""Whether a trained answer ends with a token at which the engine that serves the model stops."""

from __future__ import annotations

import json
from typing import Any

from dpo_service.inspection.subject import Subject
from dpo_service.rows.template import Tokenizer

_SAID = "An answer."


def look(subject: Subject) -> None:
    """A note, and no fault: whoever asks a served model can name the tokens to stop at."""
    if not (subject.directory / "tokenizer.json").is_file():
        return
    tokenizer = Tokenizer.load(subject.directory)
    if tokenizer.chat_template is None:
        if tokenizer.eos_token_id is None:
            subject.notes.append(
                "The model's tokenizer has no end-of-sequence token, so trained answers have no end and a served model "
                "does not know when to stop; name eos_token in tokenizer_config.json"
            )
        return
    stops, end = stopping(subject, tokenizer), closing(tokenizer)
    if end is not None and stops.isdisjoint(end):
        subject.notes.append(_unstopped(tokenizer, stops, end))


def stopping(subject: Subject, tokenizer: Tokenizer) -> set[int]:
    """Token ids that end an answer of the engine: the tokenizer's, and those of generation_config.json or, where it is
    not there, of config.json."""
    path = subject.directory / "generation_config.json"
    described = json.loads((path if path.is_file() else subject.directory / "config.json").read_text())
    named: Any = described.get("eos_token_id")
    if named is None and not path.is_file():
        named = (described.get("text_config") or {}).get("eos_token_id")
    stops = set(named) if isinstance(named, list) else {named}
    return {number for number in stops | {tokenizer.eos_token_id} if isinstance(number, int)}


def closing(tokenizer: Tokenizer) -> list[int] | None:
    """What the chat template writes after an answer; None where it takes no plain exchange."""
    ask = [{"role": "user", "content": "A question."}]
    try:
        whole = tokenizer.render([*ask, {"role": "assistant", "content": _SAID}])
    except Exception:  # a template is a program: it can fail in any way, and rows that it refuses are refused
        return None
    return tokenizer.ids(whole.rpartition(_SAID)[2], add_special_tokens=False) if _SAID in whole else None


def _unstopped(tokenizer: Tokenizer, stops: set[int], end: list[int]) -> str:
    named = ", ".join(f"{tokenizer.decode([number])!r} ({number})" for number in sorted(stops)) or "no token at all"
    written = f"{tokenizer.decode(end)!r} ({', '.join(map(str, end))})" if end else "nothing"
    return (
        f"The chat template writes {written} after an answer, and the engine stops at {named}: a served answer goes on "
        "until it is cut off; add the token that ends an answer to eos_token_id in the model's generation_config.json"
    )
