"""Attention over pairs laid end to end in one row, each as prompt | chosen | rejected, the prompt once.

                 key:  prompt  chosen  rejected
    query: prompt      causal
           chosen      all     causal
           rejected    all             causal        and nothing of any other pair

The saving is that of prefix sharing (arXiv 2410.20305). Each pair takes two calls of SDPA: prompt and chosen answer are
one causal sequence; the rejected answer asks the prompt and itself. It reaches the layers of a transformers model
through transformers' own registry of attention functions, and the layout through the arguments of the forward pass; so
nothing is remembered between calls, and two models may run by turns.

Shapes: T tokens of the row, P pairs, H query heads, K key heads, D head size; R, Q a rejected answer and all it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "dpo_segments"
"""What transformers calls this attention function."""

UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "head_mask", "position_bias")
"""Arguments by which a layer asks for more than causal attention."""


class Segment(NamedTuple):
    """One pair in the row, by its lengths in tokens; `rejected` is 0 where there is a single answer."""

    start: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def chosen_end(self) -> int:
        return self.start + self.prompt + self.chosen

    @property
    def end(self) -> int:
        return self.chosen_end + self.rejected


class Span(NamedTuple):
    """A sequence of the row: where its prompt and its answer lie."""

    prompt_at: int
    prompt: int
    answer_at: int
    answer: int


def spans(segments: Sequence[Segment]) -> list[Span]:
    """The sequences of `segments`, the chosen answers first."""
    chosen = [Span(s.start, s.prompt, s.start + s.prompt, s.chosen) for s in segments]
    return chosen + [Span(s.start, s.prompt, s.chosen_end, s.rejected) for s in segments if s.rejected]


@dataclass(frozen=True)
class Layout:
    """What every layer needs to know of the row; made once a forward pass."""

    segments: tuple[Segment, ...]
    masks_RQ: tuple[Tensor | None, ...]
    """By segment, which of prompt and rejected answer each token of the rejected answer sees; True = sees."""

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> Layout:
        return cls(tuple(segments), tuple(_rejected_mask(segment, device) for segment in segments))

    def cut(self, states_1HTD: Tensor) -> tuple[Tensor, ...]:
        """For each segment its prompt and chosen answer, then its rejected answer.

        One split and not slices: the gradient of each slice would be a zero-filled array of the whole row.
        """
        lengths = [length for s in self.segments for length in (s.prompt + s.chosen, s.rejected)]
        return states_1HTD.split(lengths, dim=2)  # type: ignore[no-untyped-call, no-any-return]


def _rejected_mask(segment: Segment, device: torch.device) -> Tensor | None:
    if not segment.rejected:
        return None
    shape = (segment.rejected, segment.prompt + segment.rejected)
    return torch.ones(shape, dtype=torch.bool, device=device).tril(segment.prompt)


def segment_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; returns [1, T, H, D]. Without a layout it is transformers' own SDPA.

    Raises:
        NotImplementedError: the layer asks for something other than causal attention.
    """
    if segment_layout is None:
        return _transformers_sdpa(
            module, query_1HTD, key_1KTD, value_1KTD, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    asked = [name for name in UNSUPPORTED if others.get(name) is not None] + ["dropout"] * (dropout > 0)
    if asked:
        raise NotImplementedError(f"attention with {', '.join(asked)}")
    outputs = []
    queries, keys, values = (segment_layout.cut(tensor) for tensor in (query_1HTD, key_1KTD, value_1KTD))
    for number, (segment, mask_RQ) in enumerate(zip(segment_layout.segments, segment_layout.masks_RQ, strict=True)):
        whole, rejected = 2 * number, 2 * number + 1
        outputs.append(_sdpa(queries[whole], keys[whole], values[whole], None, scaling))
        if mask_RQ is not None:
            key, value = (torch.cat([t[whole][:, :, : segment.prompt], t[rejected]], 2) for t in (keys, values))
            outputs.append(_sdpa(queries[rejected], key, value, mask_RQ, scaling))
    return torch.cat(outputs, 1), None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Causal where there is no mask. Tokens before heads in what it returns."""
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


def _transformers_sdpa(*tensors: Any, **options: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output: tuple[Tensor, None] = sdpa_attention_forward(*tensors, **options)
    return output


def forward_arguments(segments: Sequence[Segment], device: torch.device) -> dict[str, Any]:
    """What a model under `NAME` takes beside token and position ids to compute a row of `segments`.

    The attention mask has four dimensions, which tells transformers that it is made already; nothing reads it.
    """
    return {
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "segment_layout": Layout.of(segments, device),
    }


def register() -> None:
    """Make `NAME` known to transformers, with the masks of SDPA for calls without a layout."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
