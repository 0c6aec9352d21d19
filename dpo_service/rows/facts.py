"""What is remembered of every row of a file (54 bytes each), and what follows from it: who stays, and the report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import orjson
from numpy.typing import NDArray

from dpo_service.manifests.dataset import DatasetReport, DropCount, LengthStats
from dpo_service.rows.encode import Dropped, Encoded
from dpo_service.rows.formats import Format
from dpo_service.rows.row import Row, Text

REASONS = ("", "answer_too_long", "empty_answer", "chosen_equals_rejected", "duplicate", "in_validation")
"""Why a row is left out; a fact's `reason` is the position here, 0 = it stays."""
FACTS = np.dtype(
    [
        ("line", "i8"),
        ("prompt", "u8"),  # hash of the prompt
        ("row", "u8"),  # hash of prompt and answers
        ("reverse", "u8"),  # the same with the answers exchanged, or with the other label; 0 for single answers
        ("reason", "u1"),
        ("tie", "?"),
        ("label", "f4"),  # `Row.label`, or NaN
        ("reference", "?"),  # a prompt that comes with an answer
        ("longer", "i1"),  # 1: the chosen answer is the longer text, -1: the rejected one
        ("prompt_cut", "?"),
        ("answer_cut", "?"),
        ("n_prompt", "i4"),  # tokens; -1 = not counted
        ("n_first", "i4"),
        ("n_second", "i4"),
    ]
)
Facts = NDArray[np.void]


def fact_of(row: Row, encoded: Encoded | Dropped | None) -> tuple[object, ...]:
    """A row's entry in an array of `FACTS`. `encoded` is None where tokens were not counted."""
    first, second = _prints(row)
    reason = REASONS.index(encoded.reason) if isinstance(encoded, Dropped) else 0
    cuts, counts = (False, False), (-1, -1, -1)
    if isinstance(encoded, Encoded):
        cuts = encoded.prompt_cut, encoded.answer_cut
        lengths = [len(answer) for answer in encoded.answers]
        counts = len(encoded.prompt), (lengths or [-1])[0], lengths[1] if len(lengths) > 1 else -1
    label = np.nan if row.label is None else row.label
    marks = row.tie, label, row.reference is not None, _longer(row)
    return row.line, _hash(row.prompt), first, second, reason, *marks, *cuts, *counts


def _prints(row: Row) -> tuple[int, int]:
    if row.label is not None and len(row.answers) == 1:
        labelled = [_hash(row.prompt, row.tools, *row.answers, label) for label in (row.label, 1 - row.label)]
        return labelled[0], labelled[1]
    reverse = _hash(row.prompt, row.tools, *reversed(row.answers)) if len(row.answers) == 2 else 0
    return _hash(row.prompt, row.tools, *row.answers), reverse


def _hash(*parts: object) -> int:
    text = orjson.dumps(parts, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS, default=str)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _longer(row: Row) -> int:
    if len(row.answers) != 2:
        return 0
    first, second = (text_length(answer) for answer in row.answers)
    return (first > second) - (first < second)


def text_length(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message.get("content", "")) for message in text)


def collect(entries: Iterable[tuple[object, ...]]) -> Facts:
    """An array of `FACTS`, filled as the entries come."""
    return np.fromiter(entries, FACTS)


def decide(facts: Facts, *, deduplicate: bool, validation: Facts | None = None, held_prompts: bool = False) -> Facts:
    """`facts` with the reasons filled in that depend on other rows: repeated rows, rows that validation holds; with
    `held_prompts`, where the policy is to answer them itself, those of its prompts, whatever their answers."""
    facts = facts.copy()
    if validation is not None and held_prompts:
        _mark(facts, np.isin(facts["prompt"], validation["prompt"]), "in_validation")
    elif validation is not None:
        held = np.concatenate([validation["row"], validation["reverse"][validation["reverse"] != 0]])
        _mark(facts, np.isin(facts["row"], held), "in_validation")
    if deduplicate:
        kept = np.flatnonzero(facts["reason"] == 0)
        _, firsts = np.unique(facts["row"][kept], return_index=True)
        repeated = np.ones(len(facts), bool)
        repeated[kept[firsts]] = False
        _mark(facts, repeated, "duplicate")
    return facts


def _mark(facts: Facts, where: NDArray[np.bool_], reason: str) -> None:
    facts["reason"][where & (facts["reason"] == 0)] = REASONS.index(reason)


def report(facts: Facts, found: Format) -> DatasetReport:
    """The report on a file whose rows are decided. `found` is the format as the method reads it (`formats.as_kind`)."""
    kept = facts[facts["reason"] == 0]
    pairs, unpaired, prompts = (found.rows == kind for kind in ("pairs", "unpaired", "prompts"))
    counted = len(kept) > 0 and bool((kept["n_prompt"] >= 0).all())
    share = float((kept["longer"] > 0).sum() / max(1, (kept["longer"] != 0).sum())) if pairs and len(kept) else None
    made = DatasetReport(
        format=found.name,
        rows=len(facts),
        kept=len(kept),
        dropped=_dropped(facts),
        truncated_prompts=int(kept["prompt_cut"].sum()),
        truncated_answers=int(kept["answer_cut"].sum()),
        contradictions=int(np.isin(kept["reverse"], kept["row"]).sum()) if pairs or unpaired else 0,
        ties=int(kept["tie"].sum()),
        judged=int(np.isfinite(kept["label"]).sum()) if pairs else 0,
        desirable=int((kept["label"] == 1).sum()) if unpaired else None,
        undesirable=int((kept["label"] == 0).sum()) if unpaired else None,
        references=int(kept["reference"].sum()) if prompts else None,
        prompt_tokens=_stats(kept["n_prompt"]) if counted else None,
        chosen_tokens=_stats(kept["n_first"]) if counted and pairs else None,
        rejected_tokens=_stats(kept["n_second"]) if counted and pairs else None,
        answer_tokens=_stats(kept["n_first"]) if counted and not pairs and not prompts else None,
        longer_chosen_share=share,
    )
    return made.model_copy(update={"warnings": tuple(_warnings(made))})


def _dropped(facts: Facts) -> tuple[DropCount, ...]:
    counts = []
    for code, reason in enumerate(REASONS[1:], start=1):
        lines = facts["line"][facts["reason"] == code]
        if len(lines):
            counts.append(DropCount(reason=reason, count=len(lines), first_line=int(lines.min())))
    return tuple(counts)


def _stats(lengths: NDArray[np.int32]) -> LengthStats:
    p50, p95 = np.percentile(lengths, [50, 95], method="lower")
    return LengthStats(mean=round(float(lengths.mean()), 1), p50=int(p50), p95=int(p95), max=int(lengths.max()))


def _warnings(made: DatasetReport) -> Iterable[str]:
    share, kept = made.longer_chosen_share, max(1, made.kept)
    if share is not None and made.kept >= 20 and abs(share - 0.5) > 0.2:
        longer = "chosen" if share > 0.5 else "rejected"
        part = share if share > 0.5 else 1 - share
        yield f"the {longer} answer is the longer one in {part:.0%} of the pairs: the model may learn length"
    if made.truncated_answers > 0.1 * kept:
        yield f"{made.truncated_answers / kept:.0%} of the rows have a cut answer; a larger max_length keeps them whole"
    if made.truncated_prompts > 0.1 * kept:
        yield f"{made.truncated_prompts / kept:.0%} of the prompts lose their beginning; a larger max_length keeps it"
    if made.contradictions:
        if made.desirable is None:
            yield f"{made.contradictions} pairs are contradicted by the same pair the other way round"
        else:
            yield f"{made.contradictions} rows say desirable and undesirable of one and the same answer"
    if made.ties:
        yield f"{made.ties} pairs are ties by the annotator's own score and teach little"
    if made.kept < 0.9 * made.rows:
        yield f"only {made.kept:,} of {made.rows:,} rows are kept"
    if made.kept < 100:
        yield f"{made.kept} rows are few; expect a small effect"
