"""Attention of a packed row by torch's variable-length kernel: one call for all sequences, on CUDA in half precision.

A row is, as it stands, the queries of its sequences end to end: [prompt chosen] [rejected] [prompt chosen] ... Only the
keys of a rejected answer lie apart, so keys and values are gathered with each prompt a second time:

    queries   prompt chosen | rejected
    keys      prompt chosen | prompt rejected       causal, aligned to the end: the last query sees the last key

Shapes: T tokens of the row, G gathered tokens (T and the prompts again), N sequences, H query heads, K key heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dpo_service.train.attention.layout import Layout

LARGEST_HEAD = 256

Kernel = Callable[..., Tensor]


class Sequences(NamedTuple):
    """A row as the kernel takes it."""

    gather_G: Tensor
    """Places in the row of the keys."""
    places_2T: Tensor
    """Places among the gathered keys of each token of the row: the first, and a prompt's second, G where there is
    none."""
    queries_end: Tensor
    """[N + 1], int32: where each sequence's queries begin, and where the last ends."""
    keys_end: Tensor
    most_queries: int
    most_keys: int


def sequences(layout: Layout) -> Sequences:
    gather: list[int] = []
    queries, keys = [], []
    for segment in layout.segments:
        gather += range(segment.start, segment.chosen_end)
        queries.append(segment.prompt + segment.chosen)
        keys.append(segment.prompt + segment.chosen)
        if segment.rejected:
            gather += range(segment.start, segment.start + segment.prompt)
            gather += range(segment.chosen_end, segment.end)
            queries.append(segment.rejected)
            keys.append(segment.prompt + segment.rejected)
    return Sequences(
        layout.on_device(gather, torch.int64),
        layout.on_device(_places(gather, layout.segments[-1].end), torch.int64).view(2, -1),
        layout.on_device([0, *accumulate(queries)]),
        layout.on_device([0, *accumulate(keys)]),
        max(queries),
        max(keys),
    )


def _places(gather: list[int], tokens: int) -> list[int]:
    """`Sequences.places_2T`, row after row."""
    first, second = ([len(gather)] * tokens for _ in range(2))
    for place, token in enumerate(gather):
        (first if first[token] == len(gather) else second)[token] = place
    return first + second


class _Gather(torch.autograd.Function):
    """`states_TKD[gather_G]`. The gradient is gathered too, from a token's two places: adding it up where tokens meet
    would go by atomic operations, which cost an eighth of the attention's time."""

    @staticmethod
    def forward(ctx: Any, states_TKD: Tensor, gather_G: Tensor, places_2T: Tensor) -> Tensor:
        ctx.save_for_backward(places_2T)
        return states_TKD.index_select(0, gather_G)

    @staticmethod
    def backward(ctx: Any, grad_GKD: Tensor) -> tuple[Tensor, None, None]:
        (places_2T,) = ctx.saved_tensors
        padded = torch.cat([grad_GKD, grad_GKD.new_zeros(1, *grad_GKD.shape[1:])])
        return padded.index_select(0, places_2T[0]).add_(padded.index_select(0, places_2T[1])), None, None


def attend(
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    layout: Layout,
    *,
    scaling: float | None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `layout.Attend`; but the kernel cannot cap scores."""
    assert softcap is None, "`interface.chosen` gives capped scores to another backend"
    at: Sequences = layout.once("varlen", lambda: sequences(layout))
    key, value = (
        _Gather.apply(states[0].transpose(0, 1), at.gather_G, at.places_2T)  # type: ignore[no-untyped-call]
        for states in (key_1KTD, value_1KTD)
    )
    left = -1 if window is None else window - 1
    function = kernel()
    assert function is not None, "`available` comes first"
    return function(query_1HTD[0].transpose(0, 1), key, value, *at[2:], scale=scaling, window_size=(left, 0))[None]


def available(query_1HTD: Tensor) -> bool:
    """Whether the kernel computes heads of this kind, on this device."""
    size = query_1HTD.shape[-1]
    return (
        query_1HTD.dtype in (torch.float16, torch.bfloat16)
        and size % 8 == 0
        and size <= LARGEST_HEAD
        and _on_ampere(query_1HTD.device)
        and kernel() is not None
    )


@cache
def kernel() -> Kernel | None:
    """torch's own, of torch 2.11 or newer; None where this torch has none that takes a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes, function = inspect.signature(varlen_attn).parameters, cast(Kernel, varlen_attn)
    if not {"window_size", "scale"} <= takes.keys():
        return None
    if "enable_gqa" in takes:
        return partial(_grouped, function)
    return function if _groups_heads(function) else partial(_repeated, function)


def _groups_heads(function: Kernel) -> bool:
    """Whether a kernel that has no word for it computes fewer key heads than query heads all the same."""
    if not torch.cuda.is_available():
        return False
    query, key, value = (torch.randn(32, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    ends = torch.tensor([0, 32], device="cuda", dtype=torch.int32)
    arguments: tuple[Any, ...] = (ends, ends, 32, 32)
    try:
        found = function(query, key, value, *arguments, window_size=(-1, 0))
    except (RuntimeError, ValueError, AssertionError):
        return False
    expected = _repeated(function, query, key, value, *arguments, window_size=(-1, 0))
    return bool(torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2))


def _grouped(function: Kernel, query_THD: Tensor, key_GKD: Tensor, *rest: Any, **options: Any) -> Tensor:
    return function(query_THD, key_GKD, *rest, enable_gqa=query_THD.shape[1] != key_GKD.shape[1], **options)


def _repeated(
    function: Kernel, query_THD: Tensor, key_GKD: Tensor, value_GKD: Tensor, *rest: Any, **options: Any
) -> Tensor:
    """For a torch whose kernel wants as many key heads as query heads."""
    groups = query_THD.shape[1] // key_GKD.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (key_GKD, value_GKD))
    return function(query_THD, key, value, *rest, **options)


@cache
def _on_ampere(device: torch.device) -> bool:
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    )
