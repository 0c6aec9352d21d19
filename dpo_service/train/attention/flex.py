"""Attention of a packed row by FlexAttention: one call under a block mask made of the segments (arXiv 2412.05496).

For CUDA, compiled; it takes every precision, windows and capped scores. A token sees what stands before it in its pair,
but a rejected answer not the chosen one. The mask is known block by block without looking at its T x T entries:

    nothing seen      left out
    some seen         computed, entry by entry as `_visible` says
    all seen          computed without asking

Shapes: T tokens of the row, N = ceil(T / BLOCK) blocks, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dpo_service.train.attention.layout import Layout

BLOCK = 128
SMALLEST_HEAD = 16
"""FlexAttention's kernel for CUDA refuses smaller ones."""
PROMPT, CHOSEN, REJECTED = range(3)


class Tokens(NamedTuple):
    """What each token of the row is."""

    pair_T: Tensor
    part_T: Tensor
    """PROMPT, CHOSEN or REJECTED"""
    position_T: Tensor


def tokens(layout: Layout) -> Tokens:
    """Made on the device of as many numbers as there are parts."""
    lengths = [length for s in layout.segments for length in (s.prompt, s.chosen, s.rejected)]
    starts = [start for s in layout.segments for start in (s.start, s.start, s.chosen_end - s.prompt)]
    total = layout.segments[-1].end
    repeats = layout.on_device(lengths)
    which_T = torch.repeat_interleave(repeats, output_size=total)
    place_T = torch.arange(total, device=layout.device, dtype=torch.int32)
    return Tokens(which_T // 3, which_T % 3, place_T - layout.on_device(starts)[which_T])


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
    """As `layout.Attend`."""
    mask: BlockMask = layout.once(("flex", window), lambda: block_mask(layout, window))
    function: Any = _compiled() if query_1HTD.is_cuda else flex_attention
    output: Tensor = function(
        query_1HTD,
        key_1KTD,
        value_1KTD,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query_1HTD.shape[1] != key_1KTD.shape[1],
    )
    return output.transpose(1, 2)


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _capped(softcap: float) -> Callable[..., Tensor]:
    def bounded(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return bounded


def _visible(row: Tokens, window: int | None) -> Callable[..., Tensor]:
    """Whether one token sees another, by their places in the row."""
    pair_T, part_T, position_T = row

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        before = (key <= query) & (pair_T[key] == pair_T[query])
        sees = before & ~((part_T[query] == REJECTED) & (part_T[key] == CHOSEN))
        return sees if window is None else sees & (position_T[query] - position_T[key] < window)

    return visible


def block_mask(layout: Layout, window: int | None) -> BlockMask:
    """The row's block mask."""
    row: Tokens = layout.once("tokens", lambda: tokens(layout))
    total = layout.segments[-1].end
    some_NN, all_NN = _blocks(row, window)
    counts, indices = _ordered(some_NN & ~all_NN)
    full_counts, full_indices = _ordered(all_NN)
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=_visible(row, window),
        seq_lengths=(total, total),
    )


class _Range(NamedTuple):
    """The least and the greatest of a number in each block."""

    least_N: Tensor
    most_N: Tensor


def _blocks(row: Tokens, window: int | None) -> tuple[Tensor, Tensor]:
    """Of query blocks (down) and key blocks (across): whether any of it may be seen, and whether all of it is.

    A block said to be seen in part may hold nothing to see: that costs its computation, and changes nothing.
    """
    pair, part, position = _range(row.pair_T), _range(row.part_T), _range(row.position_T)
    place_N = torch.arange(len(pair.least_N), device=pair.least_N.device)
    before_NN = place_N[None] < place_N[:, None]
    some_NN = (place_N[None] <= place_N[:, None]) & (pair.most_N[None] >= pair.least_N[:, None])
    one_N = pair.least_N == pair.most_N
    one_NN = one_N[None] & one_N[:, None] & (pair.least_N[None] == pair.least_N[:, None])
    chosen_N, rejected_N = (part.least_N == kind for kind in (CHOSEN, REJECTED))
    some_NN &= ~(one_NN & rejected_N[:, None] & (chosen_N & (part.most_N == CHOSEN))[None])
    hides_NN = (part.most_N == REJECTED)[:, None] & (part.most_N >= CHOSEN)[None]
    all_NN = before_NN & one_NN & (~hides_NN | (rejected_N[:, None] & rejected_N[None]))
    if window is not None:
        some_NN &= position.least_N[:, None] - position.most_N[None] < window
        all_NN &= position.most_N[:, None] - position.least_N[None] < window
    ragged = len(row.pair_T) % BLOCK != 0
    if ragged:  # its last block is not whole
        all_NN[-1] = False
    return some_NN, all_NN


def _range(number_T: Tensor) -> _Range:
    """The last block is filled up with what its last token is."""
    missing = -len(number_T) % BLOCK
    number_NB = F.pad(number_T[None].float(), (0, missing), mode="replicate")[0].view(-1, BLOCK).int()
    return _Range(*torch.aminmax(number_NB, dim=1))


def _ordered(blocks_NN: Tensor) -> tuple[Tensor, Tensor]:
    """For each query block how many key blocks it has, and their numbers, those it has first."""
    counts = blocks_NN.sum(1, dtype=torch.int32)
    indices = blocks_NN.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None]
