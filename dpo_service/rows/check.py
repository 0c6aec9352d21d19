"""A file looked at before anything is trained on it: every row against its format, lengths against `max_length`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dpo_service.errors import InvalidData
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.rows.encode import Dropped, Encoded, encode
from dpo_service.rows.facts import Facts, collect, decide, fact_of, report
from dpo_service.rows.formats import Format, recognise
from dpo_service.rows.kinds import as_kind, rows_of
from dpo_service.rows.messages import Message
from dpo_service.rows.row import Row, Text
from dpo_service.rows.sources import read_rows
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.data import Truncation
from dpo_service.specs.method import RowKind

MIN_ROWS = 2
TOKENISE_BYTES = 8 << 20
"""Rows are tokenised up to so much text (seconds); beyond it only those that may be too long."""
TEMPLATE_TOKENS = 64
"""Generous bound for what a chat template puts around an answer."""


def check_file(
    path: Path,
    name: str,
    *,
    rows: RowKind | None = None,
    tokenizer: Tokenizer | None = None,
    max_length: int | None = None,
    truncation: Truncation = "refuse",
    deduplicate: bool = True,
    full: bool = False,
) -> DatasetReport:
    """Read the whole file, row by row, and report on it. Memory: about 55 bytes a row, and a JSON array's text.

    Args:
        name: what the file was uploaded as, for messages.
        rows: what the method needs; None = any known format.
        tokenizer, max_length: the model's; without them lengths are not looked at.
        full: tokenise every row of a large file too, so that the report always has lengths.

    Raises:
        InvalidData: the first row that cannot be trained on, with its line and the mend.
    """
    facts, found = examine(
        path, name, rows=rows, tokenizer=tokenizer, max_length=max_length, truncation=truncation, full=full
    )
    made = report(decide(facts, deduplicate=deduplicate), found)
    require_rows(made, name)
    return made


def examine(
    path: Path,
    name: str,
    *,
    rows: RowKind | None = None,
    tokenizer: Tokenizer | None = None,
    max_length: int | None = None,
    truncation: Truncation = "refuse",
    full: bool = False,
    answer_room: int = 0,
) -> tuple[Facts, Format]:
    """The facts of every row, before rows are compared with each other (`facts.decide`). As `check_file`; `answer_room`
    as `encode` takes it."""
    counter = _Counter(tokenizer, max_length, truncation, full, answer_room) if tokenizer is not None else None
    found: Format | None = None

    def entries() -> Iterator[tuple[object, ...]]:
        nonlocal found
        for line, raw in read_rows(path, name):
            if found is None:
                found = recognise(raw, line)
                if rows is not None:
                    found = as_kind(found, rows)
            for row in rows_of(raw, line, found):
                yield fact_of(row, counter.count(row) if counter else None)

    facts = collect(entries())
    assert found is not None
    return facts, found


def require_rows(made: DatasetReport, name: str, minimum: int = MIN_ROWS) -> None:
    """Raises InvalidData where fewer than `minimum` rows can be trained on."""
    if made.kept >= minimum:
        return
    if made.kept == made.rows:
        raise InvalidData(f"{name!r} has {made.rows} row; training needs at least {minimum}")
    reasons = ", ".join(f"{drop.count} {drop.reason.replace('_', ' ')}" for drop in made.dropped)
    raise InvalidData(
        f"of {made.rows:,} rows in {name!r} only {made.kept} can be trained on ({reasons}); "
        f"training needs at least {minimum}"
    )


@dataclass
class _Counter:
    """Tokenises rows as long as the budget lasts, then only those that may be too long."""

    tokenizer: Tokenizer
    max_length: int | None
    truncation: Truncation
    full: bool
    answer_room: int
    spent: int = field(default=0, init=False)

    def count(self, row: Row) -> Encoded | Dropped | None:
        size = _bytes(row.prompt) + sum(_bytes(answer) for answer in row.answers)
        self.spent += size
        if not self.full and self.spent > TOKENISE_BYTES and self._surely_fits(row):
            return None
        # Without a maximum nothing is too long; the length of a text in tokens is far below this.
        return encode(row, self.tokenizer, self.max_length or 1 << 40, self.truncation, self.answer_room)

    def _surely_fits(self, row: Row) -> bool:
        """No token is less than a byte of (normalised) text, so a short answer needs no counting."""
        bound = self.tokenizer.tokens_per_byte
        if self.max_length is None:
            return True
        longest = max((_bytes(answer) for answer in row.answers), default=0)
        return bound is not None and longest * bound + TEMPLATE_TOKENS < self.max_length


def _bytes(text: Text) -> int:
    return len(text.encode()) if isinstance(text, str) else sum(_message_bytes(message) for message in text)


def _message_bytes(message: Message) -> int:
    """A little more than the text: calls of tools and their like count with their names."""
    return len(str(message).encode()) if len(message) > 2 else len(message["content"].encode())
