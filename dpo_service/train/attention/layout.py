"""Pairs laid end to end in one row, each as prompt | chosen | rejected, the prompt once.

                 key:  prompt  chosen  rejected
    query: prompt      causal
           chosen      all     causal
           rejected    all             causal        and nothing of any other pair

The saving is that of prefix sharing (arXiv 2410.20305). A token's position is its place in its own sequence, so a
rejected answer's positions go on where the prompt ended, and a window of attention is exact: it counts those.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch


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
    """What every layer needs to know of a row; made once a forward pass, and goes with it into recomputation."""

    segments: tuple[Segment, ...]
    device: torch.device
    backend: str = "auto"
    """A name of `interface.BACKENDS`, or auto: by what the tensors are."""
    made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """Masks and indices that the layers share, by what they are for."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(s.prompt + max(s.chosen, s.rejected) for s in self.segments)

    def within(self, window: int | None) -> int | None:
        """`window` in tokens, a query's own among them, or None where it is too long to cut a sequence of this row."""
        return window if window is not None and window < self.longest else None

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make()` gave when first asked for under `key`."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def on_device(self, values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Without waiting for what the device has still to do."""
        tensor = torch.tensor(values, dtype=dtype)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Trial(Layout):
    """A layout that notes which windows the layers ask for."""

    windows: set[int | None] = field(default_factory=set)

    def within(self, window: int | None) -> int | None:
        self.windows.add(window)
        return super().within(window)


class Attend(Protocol):
    """What each way to compute the attention of a row is."""

    def __call__(
        self,
        query_1HTD: torch.Tensor,
        key_1KTD: torch.Tensor,
        value_1KTD: torch.Tensor,
        layout: Layout,
        *,
        scaling: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """[1, T, H, D], of H query heads and K key heads. `window` as in `Layout.within`; `scaling` None = D ** -0.5;
        `softcap`: scores become softcap * tanh(score / softcap)."""
        ...
