"""Training ids are serving ids: the tokenizer that prepares rows is held to transformers' AutoTokenizer, which the
engine that serves the model loads, on the job's own rows and on texts on which tokenizers are known to differ.

    rows of the job ─┐                       ┌── rows/template.py (training) ──┐
    probe.py ────────┴── texts, conversations┤                                  ├── same ids? ── no: Fault
                                             └── AutoTokenizer (serving) ───────┘
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from dpo_service.inspection import probe
from dpo_service.inspection.subject import Subject
from dpo_service.manifests.inspection import Fault
from dpo_service.rows.rebuilt import AS_STORED, RECIPES
from dpo_service.rows.template import Tokenizer

SHOWN_IDS, SHOWN_CHARACTERS = 8, 60
_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "added_tokens")
_MEND = (
    "load the tokenizer with AutoTokenizer.from_pretrained, save it over the model's files with save_pretrained, and "
    f"set tokenizer_class to {AS_STORED!r} in its tokenizer_config.json"
)


_Ids = list[int] | str
"""Token ids, or the sentence with which there are none."""


@dataclass(frozen=True)
class Difference:
    where: str
    """Which text it is of."""
    text: str
    ours: _Ids
    theirs: _Ids


def look(subject: Subject) -> None:
    """A Fault for the first text whose token ids differ. A model without tokenizer.json is refused where rows are
    read."""
    if not (subject.directory / "tokenizer.json").is_file():
        return
    ours = Tokenizer.load(subject.directory)
    try:
        theirs = engine_tokenizer(subject)
    except Exception as error:  # whatever a file of the model makes the library raise
        subject.faults.append(Fault(param="model", message=_unloadable(error)))
        return
    found = next(differences(ours, theirs, subject), None)
    if found is not None:
        subject.faults.append(Fault(param="model", message=_message(found, ours, theirs)))


def engine_tokenizer(subject: Subject) -> Any:
    """As vLLM loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(subject.directory, local_files_only=True, trust_remote_code=False)


def differences(ours: Tokenizer, theirs: Any, subject: Subject) -> Iterator[Difference]:
    yield from _named(ours, theirs)
    for sample in subject.request.samples:
        where = f"line {sample.line:,} of the training file"
        yield from _conversations(ours, theirs, where, sample.conversations, sample.tools)
        yield from _texts(ours, theirs, where, sample.texts)
    added = getattr(theirs, "added_tokens_decoder", {}).values()
    tried = [*probe.TEXTS, *probe.texts_with(str(token) for token in added)]
    if not _equal(ours, theirs, tried):
        yield from _texts(ours, theirs, "a test text", tried)
    for tools in (None, probe.TOOLS):
        yield from _conversations(ours, theirs, "a test conversation", probe.CONVERSATIONS, tools)


def _named(ours: Tokenizer, theirs: Any) -> Iterator[Difference]:
    for name, mine in (("bos_token", ours.bos_token_id), ("eos_token", ours.eos_token_id)):
        other = getattr(theirs, f"{name}_id")
        if mine != other:
            yield Difference(name, str(getattr(theirs, name)), _one(mine), _one(other))


def _one(number: int | None) -> list[int]:
    return [] if number is None else [number]


def _equal(ours: Tokenizer, theirs: Any, texts: list[str]) -> bool:
    """All at once, which takes a tenth of the time: some models have thousands of added tokens."""

    def same(special: bool) -> bool:
        mine = [ours.ids(text, add_special_tokens=special) for text in texts]
        return bool(theirs(texts, add_special_tokens=special)["input_ids"] == mine)

    try:
        return same(True) and same(False)
    except Exception:  # some tokenizer classes take one text at a time
        return False


def _texts(ours: Tokenizer, theirs: Any, where: str, texts: Sequence[str]) -> Iterator[Difference]:
    for text in texts:
        for special in (False, True):
            mine = ours.ids(text, add_special_tokens=special)
            other = _outcome(lambda: theirs(text, add_special_tokens=special)["input_ids"])  # noqa: B023
            if mine != other:
                yield Difference(where, text, mine, other)


def _conversations(
    ours: Tokenizer, theirs: Any, where: str, conversations: Sequence[Sequence[dict[str, Any]]], tools: Any
) -> Iterator[Difference]:
    """A template that refuses a conversation is as good as the other one's that does, too."""
    if ours.chat_template is None:
        return
    for conversation in conversations:
        said = list(conversation)
        # An answer follows a conversation that does not end with one.
        given = {"add_generation_prompt": said[-1]["role"] != "assistant", "tools": list(tools) if tools else None}
        found = _rendered(ours, theirs, said, given)
        # A template may write the time, which moves on.
        if found is not None and _rendered(ours, theirs, said, given) is not None:
            yield Difference(f"{where}, as the chat template renders it", *found)


def _rendered(
    ours: Tokenizer, theirs: Any, said: list[dict[str, Any]], given: dict[str, Any]
) -> tuple[str, _Ids, _Ids] | None:
    """What both make of a conversation, where it differs."""
    text, mine = "", cast(_Ids, [])
    try:
        text = ours.render(said, **given)
        mine = ours.ids(text, add_special_tokens=False)
    except Exception as error:  # a template is a program: it can fail in any way
        mine = str(error)
    other = _outcome(lambda: theirs.apply_chat_template(said, return_dict=False, **given))
    return None if mine == other or (isinstance(mine, str) and isinstance(other, str)) else (text, mine, other)


def _outcome(make: Callable[[], list[int]]) -> _Ids:
    try:
        return list(make())
    except Exception as error:  # tokenizers of transformers raise what they like
        return str(error)


def _unloadable(error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return (
        "transformers' AutoTokenizer, which the engine that serves the model uses, cannot load the model's tokenizer: "
        f"{reason[0] if reason else type(error).__name__}; mend the tokenizer's files so that "
        "AutoTokenizer.from_pretrained loads them without code of the model's own"
    )


def _message(found: Difference, ours: Tokenizer, theirs: Any) -> str:
    at = next((n for n, (a, b) in enumerate(zip(found.ours, found.theirs, strict=False)) if a != b), None)
    start = len(min(found.ours, found.theirs, key=len)) if at is None else at
    return (
        "the job would train on other token ids than the engine serves with: of "
        f"{_short(found.text)!r} ({found.where}) tokenizer.json makes {_shown(found.ours, start)}, and transformers' "
        f"AutoTokenizer ({type(theirs).__name__}) {_shown(found.theirs, start)}; {_cause(ours, theirs)}; {_MEND}"
    )


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _shown(ids: _Ids, start: int) -> str:
    """A few ids from before the first one that differs."""
    if isinstance(ids, str):
        return f"an error ({_short(ids)})"
    first = max(start - 2, 0)
    part = ", ".join(map(str, ids[first : first + SHOWN_IDS]))
    before, after = "…, " if first else "", ", …" if len(ids) > first + SHOWN_IDS else ""
    return f"{len(ids)} tokens [{before}{part}{after}]"


def _cause(ours: Tokenizer, theirs: Any) -> str:
    """Where the two sets of rules differ, as far as they can be compared."""
    name = type(theirs).__name__
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return f"{name} reads another file than tokenizer.json"
    mine, other = ours.rules(), json.loads(backend.to_str())
    sections = [section for section in _SECTIONS if mine[section] != other[section]]
    settings = [key for key in other["model"] if mine["model"].get(key) != other["model"][key]]
    sections += [f"model.{key}" for key in settings]
    if not sections:
        return f"{name} has the same rules and applies them in another way"
    own = "" if name in (AS_STORED, *RECIPES) else f", because {name} builds rules of its own"
    return f"they differ in {', '.join(sections)}{own}"
