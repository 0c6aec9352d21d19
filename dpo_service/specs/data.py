"""What the data stage makes of a file."""

from __future__ import annotations

from typing import Literal

from dpo_service.specs.base import Spec
from dpo_service.specs.method import RowKind

Truncation = Literal["refuse", "cut", "drop"]
"""An answer longer than `max_length`: refuse the file, cut the answer's end (its end-of-sequence token goes with it),
or drop the row. A prompt that does not fit beside its answers loses its beginning in every mode; both are counted."""


class DataSpec(Spec):
    """The data stage's whole input. Storage keys, not paths."""

    rows: RowKind
    training_file: str
    """Storage key of the uploaded file."""
    training_name: str
    """The name it was uploaded under; its ending says how it is read."""
    validation_file: str | None = None
    validation_name: str | None = None
    eval_split: float = 0.0
    max_length: int
    """Tokens of prompt plus answer."""
    truncation: Truncation = "refuse"
    answer_room: int = 0
    """Tokens that a prompt leaves free for a sampled answer."""
    mix_file: str | None = None
    """A file of pairs that are trained on among sampled ones."""
    mix_name: str | None = None
    deduplicate: bool = True
    shuffle: bool = True
    seed: int = 0
