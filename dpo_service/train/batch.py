"""From token ids to the tensors of a micro-batch.

Shapes: B input rows, L their length, S sequences (2P for pairs: the chosen answers first, then the rejected ones),
P pairs, C completion tokens of all sequences, in the order of the sequences.

    packed, B = 1:   prompt chosen rejected | prompt chosen rejected | ...      what `collate` makes
    padded, B = S:   prompt chosen ....                                         what `padded` makes of it, for models
                     prompt rejected                                            whose attention cannot be replaced

What the rest of the step relies on is only `source_C`, `target_C`, `owner_C`: which hidden state predicts which token
of which sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpo_service.train.attention.layout import Segment, spans
from dpo_service.train.rows import Example


@dataclass(frozen=True)
class MicroBatch:
    input_ids_BL: Tensor
    position_ids_BL: Tensor
    """Those of a rejected answer go on where the prompt ended."""
    source_C: Tensor
    """Index into the B*L hidden states: the one that predicts completion token c."""
    target_C: Tensor
    """That token."""
    owner_C: Tensor
    """Its sequence, 0..S-1."""
    tail_C: Tensor
    """Whether it lies past the length of the pair's shorter answer; never, for single answers."""
    segments: tuple[Segment, ...]
    """Where the pairs lie in the packed row."""
    sequences: int
    rows: int
    """Pairs, or answers."""
    tokens: int
    """Tokens of all sequences: a prompt counts once for each of its answers, as the peers count it."""
    truncated: int
    """Rows whose prompt or answer was cut."""
    attention_mask_BL: Tensor | None = None
    """1 = a token, 0 = padding; None = packed."""
    ref_chosen_P: Tensor | None = None
    ref_rejected_P: Tensor | None = None
    label_P: Tensor | None = None
    """As in `Example`, if all rows have one."""
    sampled_S: Tensor | None = None
    """The sampler's log-probability of each answer, NaN for one that was not sampled; None = none was."""
    mismatched: MicroBatch | None = None
    """The same prompts with answers of other rows, for KTO."""
    blank: bool = False
    """Computed, because sharded ranks must take part in each other's sums, and not counted."""

    @property
    def paired(self) -> bool:
        return self.sequences == 2 * self.rows

    @property
    def places(self) -> int:
        """Of the packed row, all of them tokens."""
        return sum(s.prompt + s.chosen + s.rejected for s in self.segments)

    @property
    def padded_places(self) -> int:
        """Of the rows that `padded` makes, padding included."""
        return self.sequences * max(s.prompt + max(s.chosen, s.rejected) for s in self.segments)

    @property
    def lengths_S(self) -> Tensor:
        """Completion tokens of each sequence."""
        # Not bincount: it would wait for the device.
        counts_S = torch.zeros(self.sequences, dtype=torch.int64, device=self.owner_C.device)
        return counts_S.index_add_(0, self.owner_C, torch.ones_like(self.owner_C))

    def to(self, device: torch.device) -> MicroBatch:
        """A copy in pinned memory arrives without anybody waiting for it."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        nested = self.mismatched.pinned() if self.mismatched is not None else None
        return replace(self._moved(Tensor.pin_memory), mismatched=nested)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> MicroBatch:
        tensors = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        mismatched = self.mismatched._moved(move) if self.mismatched is not None else None
        return replace(self, **tensors, mismatched=mismatched)  # type: ignore[arg-type]


def collate(examples: Sequence[Example], mismatched: Sequence[Example] = ()) -> MicroBatch:
    """The packed micro-batch of `examples`: all pairs, or all answers; prompts and answers hold at least one token."""
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    for example in examples:
        prompt, chosen, rejected = example.prompt, example.chosen, example.rejected
        assert len(prompt) > 0, "the data stage keeps no row with an empty prompt"
        assert len(chosen) > 0, "the data stage keeps no row with an empty answer"
        assert rejected is None or len(rejected) > 0, "the data stage keeps no row with an empty answer"
        segments.append(Segment(len(tokens), len(prompt), len(chosen), len(rejected or ())))
        tokens += [*prompt, *chosen, *(rejected or ())]
        positions += [*range(len(prompt) + len(chosen)), *range(len(prompt), len(prompt) + len(rejected or ()))]
    sequences = spans(segments)
    input_ids_T = torch.tensor(tokens)
    return MicroBatch(
        input_ids_BL=input_ids_T[None],
        position_ids_BL=torch.tensor([positions]),
        source_C=torch.tensor([place for s in sequences for place in _predictors(s.prompt_at, *s[1:])]),
        target_C=torch.cat([input_ids_T[s.answer_at : s.answer_at + s.answer] for s in sequences]),
        owner_C=torch.tensor([owner for owner, s in enumerate(sequences) for _ in range(s.answer)]),
        tail_C=_past_the_shorter([s.answer for s in sequences], len(examples)),
        segments=tuple(segments),
        sequences=len(sequences),
        rows=len(examples),
        tokens=sum(s.prompt + s.answer for s in sequences),
        truncated=sum(example.truncated for example in examples),
        ref_chosen_P=_column([example.ref_chosen for example in examples]),
        ref_rejected_P=_column([example.ref_rejected for example in examples]),
        label_P=_column([example.label for example in examples]),
        sampled_S=_sampled(examples),
        mismatched=collate(mismatched) if mismatched else None,
    )


def padded(batch: MicroBatch) -> MicroBatch:
    """The same micro-batch with a sequence a row, padded on the right: the plain computation."""
    sequences, row_T = spans(batch.segments), batch.input_ids_BL[0]
    rows = [
        torch.cat([row_T[s.prompt_at : s.prompt_at + s.prompt], row_T[s.answer_at : s.answer_at + s.answer]])
        for s in sequences
    ]
    input_ids_BL = pad_sequence(rows, batch_first=True)
    length, device = input_ids_BL.shape[1], row_T.device
    lengths_S = torch.tensor([len(row) for row in rows], device=device)
    places_L = torch.arange(length, device=device)
    starts = [row * length for row in range(len(rows))]
    source = [
        place
        for start, s in zip(starts, sequences, strict=True)
        for place in _predictors(start, s.prompt, start + s.prompt, s.answer)
    ]
    return replace(
        batch,
        input_ids_BL=input_ids_BL,
        attention_mask_BL=(places_L < lengths_S[:, None]).long(),
        position_ids_BL=torch.minimum(places_L, lengths_S[:, None] - 1),  # padding lengthens no sequence
        source_C=torch.tensor(source, device=device),
    )


def _predictors(prompt_at: int, prompt: int, answer_at: int, answer: int) -> list[int]:
    """The places that predict an answer's tokens: the prompt's last, then all of the answer but its last."""
    return [prompt_at + prompt - 1, *range(answer_at, answer_at + answer - 1)]


def _past_the_shorter(lengths: Sequence[int], rows: int) -> Tensor:
    """`MicroBatch.tail_C`, from the lengths of the S answers, chosen first."""
    shared = [min(lengths[row::rows]) for row in range(rows)]
    return torch.tensor([place >= shared[i % rows] for i, length in enumerate(lengths) for place in range(length)])


def _sampled(examples: Sequence[Example]) -> Tensor | None:
    values = [example.sampled_chosen for example in examples]
    if examples[0].rejected is not None:
        values += [example.sampled_rejected for example in examples]
    if all(value is None for value in values):
        return None
    return torch.tensor([math.nan if value is None else value for value in values])


def _column(values: list[float | None]) -> Tensor | None:
    known = [value for value in values if value is not None]
    return torch.tensor(known, dtype=torch.float32) if known and len(known) == len(values) else None
