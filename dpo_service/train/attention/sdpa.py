"""Attention of a packed row by SDPA, two calls a pair: for CPUs, and wherever there is nothing better.

Prompt and chosen answer are one causal sequence; the rejected answer asks the prompt and itself.

Shapes: T tokens of the row, H query heads, K key heads, D head size; R, Q an answer (or a sequence) and all it sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_service.train.attention.layout import Layout


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
    outputs = []
    queries, keys, values = (_cut(layout, tensor) for tensor in (query_1HTD, key_1KTD, value_1KTD))
    for number, segment in enumerate(layout.segments):
        whole, rejected = 2 * number, 2 * number + 1
        length = segment.prompt + segment.chosen
        mask_RQ = _mask(layout, length, 0, window, softcap)
        outputs.append(_attend(queries[whole], keys[whole], values[whole], mask_RQ, scaling, softcap))
        if segment.rejected:
            key, value = (torch.cat([t[whole][:, :, : segment.prompt], t[rejected]], 2) for t in (keys, values))
            mask_RQ = _mask(layout, segment.rejected, segment.prompt, window, softcap)
            outputs.append(_attend(queries[rejected], key, value, mask_RQ, scaling, softcap))
    return torch.cat(outputs, 1)


def _cut(layout: Layout, states_1HTD: Tensor) -> tuple[Tensor, ...]:
    """For each segment its prompt and chosen answer, then its rejected answer.

    One split and not slices: the gradient of each slice would be a zero-filled array of the whole row.
    """
    lengths = [length for s in layout.segments for length in (s.prompt + s.chosen, s.rejected)]
    return states_1HTD.split(lengths, dim=2)  # type: ignore[no-untyped-call, no-any-return]


def _mask(layout: Layout, queries: int, before: int, window: int | None, softcap: float | None) -> Tensor | None:
    """Which of the `before` tokens and its own each of so many queries sees; None = plainly causal."""
    cuts = window is not None and window < before + queries
    if before == 0 and not cuts and softcap is None:
        return None
    return layout.once(  # type: ignore[no-any-return]
        ("sdpa", queries, before, window if cuts else None),
        lambda: _triangle(queries, before, window if cuts else None, layout.device),
    )


def _triangle(queries: int, before: int, window: int | None, device: torch.device) -> Tensor:
    sees_RQ = torch.ones(queries, before + queries, dtype=torch.bool, device=device).tril(before)
    return sees_RQ if window is None else sees_RQ.triu(before - window + 1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """Causal where there is no mask. Tokens before heads in what it returns."""
    if softcap is not None:
        return capped(query, key, value, mask, scaling, softcap).transpose(1, 2)
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


def capped(
    query_BHRD: Tensor, key_BKQD: Tensor, value_BKQD: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """[B, H, R, D] with scores bounded as in Gemma 2 (arXiv 2408.00118): softcap * tanh(score / softcap).

    SDPA cannot; so all scores of the call exist at one time. No mask = causal, aligned to the end.
    """
    queries, keys, groups = query_BHRD.shape[2], key_BKQD.shape[2], query_BHRD.shape[1] // key_BKQD.shape[1]
    if mask is None:
        mask = _triangle(queries, keys - queries, None, query_BHRD.device)
    key, value = (states.repeat_interleave(groups, 1) for states in (key_BKQD, value_BKQD))
    scores = query_BHRD @ key.transpose(2, 3) * (query_BHRD.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
