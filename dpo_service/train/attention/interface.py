"""The one attention function that computes packed rows, and which way it takes.

    on CUDA, half precision   varlen    torch's variable-length kernel: one call, keys gathered
    on CUDA, else             flex      FlexAttention: one call under a block mask (float32, capped scores)
    elsewhere, tiny heads     sdpa      two calls of SDPA a pair

It reaches the layers of a transformers model through transformers' own registry of attention functions, and the layout
through the arguments of the forward pass; so nothing is remembered between calls, and two models may run by turns.
Windows of attention are exact on every way; scores are capped by flex and sdpa.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from dpo_service.train.attention import flex, sdpa, varlen
from dpo_service.train.attention.layout import Attend, Layout, Segment

NAME = "dpo_segments"
"""What transformers calls this attention function."""

BACKENDS: dict[str, Attend] = {"sdpa": sdpa.attend, "flex": flex.attend, "varlen": varlen.attend}

REDUNDANT = ("position_ids", "cache_position")
"""Tensors that layers pass on to attention and that the layout has already; any other asks for more than causal
attention, windows and capped scores (sinks `s_aux`, `position_bias`, the chosen keys `indices` of sparse attention)."""

_backend: ContextVar[str] = ContextVar("attention_backend", default="auto")


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Within, rows are computed by this one of `BACKENDS`: for tests and measurements."""
    assert backend in BACKENDS
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


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
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; returns [1, T, H, D]. Without a layout it is transformers' own.

    Raises:
        NotImplementedError: the layer asks for something other than causal attention.
    """
    if segment_layout is None:
        options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
        return _transformers_own(module, query_1HTD, key_1KTD, value_1KTD, attention_mask, **options, **others)
    asked = [name for name, value in others.items() if isinstance(value, Tensor) and name not in REDUNDANT]
    # `forward_arguments` gives a mask of one place: if it is larger, the layer chooses what its tokens see.
    asked += ["a mask of its own"] * (attention_mask is not None and attention_mask.numel() > 1)
    asked += ["dropout"] * (dropout > 0)
    if asked:
        raise NotImplementedError(f"attention with {', '.join(asked)}")
    dtype = _computed_in(query_1HTD)
    query, key, value = (tensor.to(dtype) for tensor in (query_1HTD, key_1KTD, value_1KTD))
    window = segment_layout.within(sliding_window)
    attend = BACKENDS[chosen(query, value, segment_layout, softcap)]
    return attend(query, key, value, segment_layout, scaling=scaling, window=window, softcap=softcap), None


def chosen(query_1HTD: Tensor, value_1KTD: Tensor, layout: Layout, softcap: float | None) -> str:
    """Which of `BACKENDS` computes these states."""
    if layout.backend != "auto":
        return layout.backend
    if not query_1HTD.is_cuda or query_1HTD.shape[-1] != value_1KTD.shape[-1]:
        return "sdpa"
    if softcap is None and varlen.available(query_1HTD):
        return "varlen"
    return "flex" if query_1HTD.shape[-1] >= flex.SMALLEST_HEAD else "sdpa"


def _computed_in(states: Tensor) -> torch.dtype:
    """Under autocast SDPA casts by itself, the other ways do not."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _transformers_own(module: nn.Module, *states: Any, softcap: float | None, **options: Any) -> tuple[Tensor, None]:
    """SDPA; with capped scores, which it does not know, the computation of packed rows under the same masks."""
    if softcap is not None:
        query, key, value, mask = states
        return sdpa.capped(query, key, value, mask, options["scaling"], softcap).transpose(1, 2), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output: tuple[Tensor, None] = sdpa_attention_forward(module, *states, **options)
    return output


def row_layout(segments: Sequence[Segment], device: torch.device) -> Layout:
    """What a forward pass over a row of `segments` needs to know of it."""
    return Layout(tuple(segments), device, _backend.get())


def forward_arguments(layout: Layout) -> dict[str, Any]:
    """What a model under `NAME` takes beside token and position ids to compute a packed row.

    The attention mask has four dimensions, which tells transformers that it is made already; nothing reads it.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.device)
    return {"attention_mask": mask, "segment_layout": layout}


def register() -> None:
    """Make `NAME` known to transformers, with the masks of SDPA for calls without a layout."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
