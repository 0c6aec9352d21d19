"""From token ids to the tensors of a micro-batch.

Shapes: B input rows, L their length, S sequences (2P for pairs: the chosen answers first, then the rejected ones),
P pairs, C completion tokens of all sequences.

The layout here is the plain one: a sequence a row, padded on the right. What the rest of the step relies on is only
`source_C`, `target_C`, `owner_C`: which hidden state predicts which token of which sequence. A layout that lays pairs
end to end in one row fills the same three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpo_service.train.rows import Example


@dataclass(frozen=True)
class MicroBatch:
    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    """1 = a token, 0 = padding."""
    position_ids_BL: Tensor
    source_C: Tensor
    """Index into the B*L hidden states: the one that predicts completion token c."""
    target_C: Tensor
    """That token."""
    owner_C: Tensor
    """Its sequence, 0..S-1."""
    sequences: int
    rows: int
    """Pairs, or answers."""
    tokens: int
    """Tokens computed, padding aside."""
    truncated: int
    """Rows whose prompt or answer was cut."""
    ref_chosen_P: Tensor | None = None
    ref_rejected_P: Tensor | None = None

    @property
    def paired(self) -> bool:
        return self.sequences == 2 * self.rows

    @property
    def lengths_S(self) -> Tensor:
        """Completion tokens of each sequence."""
        return torch.bincount(self.owner_C, minlength=self.sequences)

    def to(self, device: torch.device) -> MicroBatch:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


def collate(examples: Sequence[Example]) -> MicroBatch:
    """The micro-batch of `examples`: all pairs, or all answers; prompts and answers hold at least one token each."""
    sequences = [(example.prompt, example.chosen) for example in examples]
    sequences += [(example.prompt, example.rejected) for example in examples if example.rejected is not None]
    length = max(len(prompt) + len(answer) for prompt, answer in sequences)
    input_ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    source: list[int] = []
    owner: list[int] = []
    for row, (prompt, answer) in enumerate(sequences):
        assert len(prompt) > 0, "the data stage keeps no row with an empty prompt"
        assert len(answer) > 0, "the data stage keeps no row with an empty answer"
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor([*prompt, *answer])
        mask[row, :end] = 1
        source += range(row * length + len(prompt) - 1, row * length + end - 1)
        owner += [row] * len(answer)
    source_C = torch.tensor(source)
    return MicroBatch(
        input_ids_BL=input_ids,
        attention_mask_BL=mask,
        position_ids_BL=torch.arange(length).expand(len(sequences), length),
        source_C=source_C,
        target_C=input_ids.flatten()[source_C + 1],
        owner_C=torch.tensor(owner),
        sequences=len(sequences),
        rows=len(examples),
        tokens=int(mask.sum()),
        truncated=sum(example.truncated for example in examples),
        ref_chosen_P=_column([example.ref_chosen for example in examples]),
        ref_rejected_P=_column([example.ref_rejected for example in examples]),
    )


def _column(values: list[float | None]) -> Tensor | None:
    known = [value for value in values if value is not None]
    return torch.tensor(known, dtype=torch.float32) if known and len(known) == len(values) else None
