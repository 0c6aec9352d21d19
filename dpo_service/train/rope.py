"""Rotary positions whose frequencies depend on how long a sequence is: each sequence gets those it would get alone.

    longrope (Phi-3, arXiv 2402.13753)    one set of frequencies up to the original length, another beyond it
    dynamic NTK                           beyond the model's length, every length has frequencies of its own

transformers takes the length from the largest position of the whole call, so a short sequence is computed as a long one
if a long one is beside it; and dynamic NTK keeps the frequencies of the longest sequence seen so far. Here the module
that computes cos and sin is put under one that calls it once for each run of sequences with the same frequencies, on a
copy as it was loaded, and joins what it gives. Attention needs to know nothing of it, and rows stay packed. The runs
are read off the positions, of which each sequence's begin at 0: they reach every call, that of a recomputed layer too,
while anything set beside the model would be another batch's by then. What that cannot do is give a shared prompt two
sets of frequencies; `shares_prompts` finds such pairs, and their micro-batch is computed padded.

Which lengths share frequencies is found by trying the module, not by the name of its kind.

Shapes: B x L input, D of a head.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dpo_service.train.attention.layout import Segment
from dpo_service.train.language import language_modules

LONGEST = 2**20
"""Tokens of the longest sequence that is tried, of a model that does not name its length."""


@dataclass(frozen=True)
class Kinds:
    """Which lengths of a sequence have the same frequencies: all up to `same_to`, and beyond it all or none."""

    same_to: int
    one_beyond: bool

    def of(self, length: int) -> int:
        """Equal for lengths that share frequencies."""
        if length <= self.same_to:
            return 0
        return self.same_to + 1 if self.one_beyond else length


class Run(NamedTuple):
    """Neighbours in a row that share frequencies."""

    kind: int
    start: int
    end: int


class OwnFrequencies(nn.Module):
    """A rotary embedding that gives every sequence of its input the cos and sin it would get alone."""

    def __init__(self, rotary: nn.Module, kinds: Kinds) -> None:
        super().__init__()
        self.rotary = rotary
        self.kinds = kinds
        self.config = getattr(rotary, "config", None)  # some models read it there

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> Any:
        """As `rotary`: one tensor [B, L, D], or several. Waits for the device, once, as dynamic NTK does by itself."""
        # Of positions of several kinds (M-RoPE) the first are those in the sequence.
        first_BL = position_ids if position_ids.ndim == 2 else position_ids[0]
        rows = [runs(row, self.kinds) for row in first_BL.cpu().numpy()]
        if len({run.kind for row in rows for run in row}) == 1:
            return as_loaded(self.rotary)(x, position_ids, *args, **options)
        joined = []
        for number, row in enumerate(rows):
            positions_1L = position_ids.narrow(-2, number, 1)
            parts = [as_loaded(self.rotary)(x, positions_1L[..., run.start : run.end], *args, **options) for run in row]
            joined.append(_joined(parts, -2))
        return _joined(joined, -3)


def runs(positions_L: np.ndarray[Any, np.dtype[np.int64]], kinds: Kinds) -> list[Run]:
    """Of one row of positions: each sequence, or pair, begins at 0 and is as long as its largest position says."""
    starts = np.union1d([0], np.flatnonzero(positions_L == 0))
    ends = [*starts[1:].tolist(), len(positions_L)]
    lengths = np.maximum.reduceat(positions_L, starts) + 1
    found: list[Run] = []
    for start, end, length in zip(starts.tolist(), ends, lengths.tolist(), strict=True):
        kind = kinds.of(length)
        if found and found[-1].kind == kind:
            start = found.pop().start
        found.append(Run(kind, start, end))
    return found


def _joined(parts: Sequence[Any], dim: int) -> Any:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts), dim)
    return tuple(torch.cat(list(tensors), dim) for tensors in zip(*parts, strict=True))


def as_loaded(rotary: nn.Module) -> nn.Module:
    """A copy that a call may change: transformers keeps the last call's frequencies in the module."""
    fresh = copy.copy(rotary)
    fresh._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in rotary._buffers.items()}
    return fresh


def own_frequencies(model: nn.Module) -> bool:
    """Put every rotary embedding of `model` whose frequencies depend on length under `OwnFrequencies`; whether there
    was one."""
    found = list(length_dependent(model))
    for parent, name, kinds in found:
        setattr(parent, name, OwnFrequencies(getattr(parent, name), kinds))
    return bool(found)


def length_dependent(model: nn.Module) -> Iterator[tuple[nn.Module, str, Kinds]]:
    """The rotary embeddings of the language model whose frequencies depend on length: what holds them, and under which
    name. Those of parts that read images have positions of another kind, and are never run."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    longest = 2 * int(getattr(text, "max_position_embeddings", None) or LONGEST)
    for parent in [module for module in language_modules(model) if not isinstance(module, OwnFrequencies)]:
        for name, child in parent.named_children():
            if _is_rotary(child) and (kinds := kinds_of(_with_numbers(child), longest)) is not None:
                yield parent, name, kinds


def shares_prompts(model: nn.Module, segments: Sequence[Segment]) -> bool:
    """Whether the two sequences of each pair have the same frequencies, so that one prompt serves both."""
    everywhere = {module.kinds for module in model.modules() if isinstance(module, OwnFrequencies)}
    return all(
        kinds.of(s.prompt + s.chosen) == kinds.of(s.prompt + s.rejected)
        for kinds in everywhere
        for s in segments
        if s.rejected
    )


def _is_rotary(module: nn.Module) -> bool:
    return "rotary" in type(module).__name__.lower() and "position_ids" in inspect.signature(module.forward).parameters


def _with_numbers(rotary: nn.Module) -> nn.Module:
    """`rotary`, or where it is on the meta device one like it that is not: it has no weights to be read."""
    if all(buffer.device.type != "meta" for buffer in rotary.buffers()):
        return rotary
    kind: Any = type(rotary)
    with torch.device("cpu"):
        return kind(rotary.config)  # type: ignore[no-any-return]


def kinds_of(rotary: nn.Module, longest: int) -> Kinds | None:
    """What lengths of up to `longest` show of `rotary`; None = they all have the same frequencies."""
    found = {_kinds(rotary, longest, options) for options in _layer_types(rotary)} - {None}
    if len(found) <= 1:
        return found.pop() if found else None
    # Layers of several types: lengths that differ in any of them differ.
    return Kinds(min(kinds.same_to for kinds in found if kinds is not None), one_beyond=False)


def _layer_types(rotary: nn.Module) -> Iterator[dict[str, str]]:
    """Arguments under which `rotary` has frequencies."""
    if "layer_type" not in inspect.signature(rotary.forward).parameters or not isinstance(rotary.rope_type, dict):
        yield {}
        return
    yield from ({"layer_type": name} for name in rotary.rope_type)


def _kinds(rotary: nn.Module, longest: int, options: dict[str, str]) -> Kinds | None:
    def same(one: int, other: int) -> bool:
        return torch.equal(_frequencies(rotary, one, options), _frequencies(rotary, other, options))

    if same(2, longest):
        return None
    low, high = 2, longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if same(2, middle) else (low, middle)
    return Kinds(low, one_beyond=same(high, longest))


@torch.no_grad()
def _frequencies(rotary: nn.Module, length: int, options: dict[str, str]) -> Tensor:
    """What `rotary` gives for the second token of a sequence of so many; any angle of it changes with its frequency."""
    device = next((buffer.device for buffer in rotary.buffers()), torch.device("cpu"))
    found = as_loaded(rotary)(
        torch.zeros(1, 2, 1, device=device), torch.tensor([[1, length - 1]], device=device), **options
    )
    tensors = [found] if isinstance(found, Tensor) else found
    return torch.cat([torch.view_as_real(t).flatten(-2) if t.is_complex() else t for t in tensors], -1)[..., 0, :]
