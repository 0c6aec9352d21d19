"""Model FLOPs utilisation: the operations a step cannot do without, against the device's own measured matrix rate.

A multiplication and its addition are two operations. A weight matrix of N numbers costs a token 2 N forward, 2 N for
the gradient of its input and, if it is trained, 2 N for its own (PaLM, arXiv 2204.02311, appendix B): 6 N, or 4 N
frozen under an adapter. Each is counted for the tokens it must see: the layers for every token of the row, a prompt
once; the output head where a completion token is predicted; attention by the pairs of tokens that see each other. KTO's
mismatched answers, which its loss cannot do without, go forward only: 2 N. What is computed again in the backward pass,
padding, a live reference and all that is no matrix product count for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dpo_service.clock import monotonic
from dpo_service.train.attention.layout import Segment
from dpo_service.train.language import language_body
from dpo_service.train.policy import base_of

FORWARD_AND_BACKWARD = 3
"""Attention has no weights: a product forward is two of its size backward."""

BUDGET_S = 0.3
LONGEST_S = 0.05
"""A product that would take longer is not tried: a smaller one has shown the rate."""
SIZES = (512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Cost:
    """What one pass through a model costs, in floating point operations."""

    token: float
    """The layers' weights, a token of the row."""
    predicted: float
    """The output head, a completion token."""
    attended: tuple[tuple[float, int | None], ...]
    """By kind of layer: attention's two products, a pair of tokens; and its sliding window, None = no limit."""

    @classmethod
    def of(cls, policy: Any, *, backward: bool = True) -> Cost:
        """The cost of training `policy`, a model of transformers or the peft model around it, as it stands; or of going
        through it forward only."""
        model = base_of(policy)
        config = model.config.get_text_config()
        head = [] if (found := model.get_output_embeddings()) is None else list(found.modules())
        layers = [module for module in language_body(model).modules() if all(module is not part for part in head)]
        share = _active_experts(config)
        return cls(
            sum(_weights(module, share, backward) for module in layers),
            sum(_weights(module, 1.0, backward) for module in head),
            _attention(config, FORWARD_AND_BACKWARD if backward else 1),
        )

    def of_pairs(self, segments: Sequence[Segment]) -> float:
        """That of one micro-batch."""
        tokens = sum(s.prompt + s.chosen + s.rejected for s in segments)
        answers = sum(s.chosen + s.rejected for s in segments)
        attended = sum(per_pair * sum(_seen(s, window) for s in segments) for per_pair, window in self.attended)
        return self.token * tokens + self.predicted * answers + attended


def _weights(module: nn.Module, active_experts: float, backward: bool) -> float:
    """Operations a token for the weights that lie in `module` itself."""
    if isinstance(module, nn.Embedding):
        return 0.0
    own = dict(module.named_parameters(recurse=False))
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if "weight" in own and isinstance(inputs, int) and isinstance(outputs, int):
        # Not the weight's own size: one of four bits is packed.
        return _passes(own["weight"], backward) * inputs * outputs
    matrices = [parameter for parameter in own.values() if parameter.dim() >= 2]
    return sum(_passes(p, backward) * p.numel() * (active_experts if p.dim() == 3 else 1.0) for p in matrices)


def _passes(weight: Tensor, backward: bool) -> int:
    if not backward:
        return 2
    return 6 if weight.requires_grad else 4


def _active_experts(config: Any) -> float:
    """The share of its experts that a mixture gives each token; their weights are one array of three dimensions."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if chosen and experts else 1.0


def _attention(config: Any, passes: int) -> tuple[tuple[float, int | None], ...]:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return ()
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    full = "full_attention" if window is None else "sliding_attention"
    kinds = list(getattr(config, "layer_types", None) or [full] * int(config.num_hidden_layers))
    a_layer = passes * 2 * 2.0 * heads * size
    windows = {"full_attention": None, "sliding_attention": window}
    return tuple((a_layer * kinds.count(kind), windows[kind]) for kind in windows if kind in kinds)


def _seen(segment: Segment, window: int | None) -> float:
    """Pairs of a token and one it sees."""
    prompt = segment.prompt
    rejected = _causal(prompt + segment.rejected, window) - _causal(prompt, window) if segment.rejected else 0.0
    return _causal(prompt + segment.chosen, window) + rejected


def _causal(length: int, window: int | None) -> float:
    """Those of a causal sequence, where a token sees at most `window` tokens, itself included."""
    first = length if window is None else min(window, length)
    return first * (first + 1) / 2 + (length - first) * first


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of `torch.mm` on `device`, the best of several sizes; measured once a process, in 0.3 s."""
    best = 0.0
    for size in SIZES:
        if best and 2.0 * size**3 / best > LONGEST_S:
            break
        best = max(best, _rate(size, device, dtype, BUDGET_S / len(SIZES)))
    if device.type == "cuda":
        # What was held for this is not the training's.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return best


def _rate(size: int, device: torch.device, dtype: torch.dtype, budget: float) -> float:
    """The best product of two random matrices made in `budget` seconds; the first only warms up, and one is made."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.rand(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    _seconds(left, right, product)
    best, ends = _seconds(left, right, product), monotonic() + budget
    while monotonic() < ends:
        best = min(best, _seconds(left, right, product))
    return 2.0 * size**3 / best


def _seconds(left: Tensor, right: Tensor, product: Tensor) -> float:
    _wait(left.device)
    started = monotonic()
    torch.mm(left, right, out=product)
    _wait(left.device)
    return monotonic() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
