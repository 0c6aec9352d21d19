"""What the data stage made."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_service.specs.base import Spec
from dpo_service.specs.method import RowKind

ANSWERS: Mapping[RowKind, tuple[str, ...]] = {
    "pairs": ("chosen", "rejected"),
    "answers": ("answer",),
    "unpaired": ("answer", "mismatched"),
    "prompts": (),
    "demonstrations": ("answer",),
}
"""The columns that hold answers to the prompt. `mismatched` is another row's answer, to which the prompt has nothing to
say: KTO measures on it how far the policy has moved in general."""


class LengthStats(Spec):
    """Token counts: mean and percentiles."""

    mean: float
    p50: int
    p95: int
    max: int


class DropCount(Spec):
    reason: str
    """duplicate | answer_too_long | empty_answer | chosen_equals_rejected | in_validation | …"""
    count: int
    first_line: int | None = None


class DatasetReport(Spec):
    """What a person wants to know of a file before training on it. Lengths are absent without a tokenizer."""

    format: str
    rows: int
    """Rows in the file."""
    kept: int
    dropped: tuple[DropCount, ...] = ()
    truncated_prompts: int = 0
    truncated_answers: int = 0
    contradictions: int = 0
    """Pairs whose reverse is also in the file; answers that are both desirable and undesirable."""
    ties: int = 0
    """Pairs the annotator marked as equal (a margin or score difference of 0)."""
    judged: int = 0
    """Pairs with a `chosen_probability`."""
    desirable: int | None = None
    undesirable: int | None = None
    references: int | None = None
    """Of prompts whose answers are sampled: how many come with an answer that a judge can compare with."""
    prompt_tokens: LengthStats | None = None
    chosen_tokens: LengthStats | None = None
    rejected_tokens: LengthStats | None = None
    answer_tokens: LengthStats | None = None
    longer_chosen_share: float | None = None
    """Share of pairs whose chosen answer is the longer one: far from one half, the model may learn length."""
    warnings: tuple[str, ...] = ()


class SplitManifest(Spec):
    name: str
    """train | validation"""
    files: tuple[str, ...]
    """Storage keys of Parquet files, in order; rows are in `index` order."""
    rows: int
    tokens: int
    digest: str
    """sha256 over the rows' token ids, in order."""


class DatasetManifest(Spec):
    """The prepared dataset.

    Parquet columns: index int64; prompt and `ANSWERS` list<int32>; truncated bool; line int64, in the uploaded file;
    label float32 of unpaired rows, 1 = desirable, 0 = undesirable, and of pairs where any has a judged probability that
    chosen wins; and where the reference is cached float32 ref_chosen and so on, one for each column of answers.

    Where answers are sampled, also strings: prompt_text, JSON of a text or of a conversation's messages; reference, the
    file's own answer, or null; row, a JSON object of the row's other columns.
    """

    rows: RowKind
    train: SplitManifest
    validation: SplitManifest | None = None
    mix: SplitManifest | None = None
    """Pairs to train on among sampled ones."""
    report: DatasetReport
    plan: str
    """Storage key of the batch plan or, of prompts, of their order (rows/plan.py)."""
    steps_per_epoch: int
    """Of prompts: steps in which each is sampled once, if each gives a pair."""
    total_steps: int
    tokenizer_digest: str
    template_digest: str | None = None
    reference_digest: str | None = None
    """Digest of the model the cached reference log-probabilities come from."""
