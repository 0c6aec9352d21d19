"""Random rows of queries, keys and values, and the plain computation to hold every attention backend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_service.train.attention.interface import row_layout
from dpo_service.train.attention.layout import Layout, Segment, spans


@dataclass
class Row:
    layout: Layout
    states: list[Tensor]
    """Query [1, H, T, D], key and value [1, K, T, D], leaves that take gradients."""
    weights: Tensor
    """What the output is multiplied with, to have a scalar."""

    def gradients(self, output_1THD: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((output_1THD * self.weights).sum(), self.states)


def random_row(seed=0, *, heads=4, groups=2, size=16, device="cpu", dtype=torch.float32, largest=90):
    generator = torch.Generator().manual_seed(seed)
    segments, start = [], 0
    for number in range(4):
        prompt, chosen, rejected = (int(n) for n in torch.randint(1, largest, (3,), generator=generator))
        segments.append(Segment(start, prompt, chosen, 0 if number == 2 else rejected))
        start = segments[-1].end
    shapes = [(1, heads, start, size)] + [(1, heads // groups, start, size)] * 2
    states = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    weights = torch.randn(1, start, heads, size, generator=generator).to(device)
    return Row(row_layout(segments, torch.device(device)), states, weights)


def plain(row: Row, *, window=None, softcap=None) -> Tensor:
    """One sequence at a time, every score written out. A prompt's tokens come from its first sequence."""
    query, key, value = row.states
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = torch.zeros_like(query)
    for number, span in reversed(list(enumerate(spans(row.layout.segments)))):
        answer = range(span.answer_at, span.answer_at + span.answer)
        places = torch.tensor([*range(span.prompt_at, span.prompt_at + span.prompt), *answer], device=query.device)
        q, k, v = (states[:, :, places] for states in (query, key, value))
        scores = q.float() @ k.float().transpose(2, 3) / query.shape[-1] ** 0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(places))[:, None] - torch.arange(len(places))
        sees = (distance >= 0) & (distance < (window or len(places)))
        scores = scores.masked_fill(~sees.to(query.device), float("-inf"))
        result = (scores.softmax(-1) @ v.float()).to(query.dtype)
        first = span.prompt if number >= len(row.layout.segments) else 0
        output = output.index_copy(2, places[first:], result[:, :, first:])
    return output.transpose(1, 2)
