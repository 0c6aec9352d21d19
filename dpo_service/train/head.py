"""Log-probabilities of tokens from the states that predict them, without a whole [tokens, vocabulary] array.

The output head is applied to a chunk of tokens at a time. In float32 the exponentials of the first chunks' logits are
kept for the backward pass, as many as `KEPT_LOGITS`; all others are thrown away and computed again there, which needs
of them only the largest logit and the logarithm of the sum. Sums are float32 whatever the arithmetic.

Shapes: C completion tokens, K tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dpo_service.specs.room import KEPT_LOGITS, chunk_tokens
from dpo_service.train.half_head import Bounds, HalfHeadLogps
from dpo_service.train.products import Linear, product


class Head(NamedTuple):
    """logits = bounded(scale * module(hidden)), bounded(x) = softcap * tanh(x / softcap) or x."""

    module: nn.Module
    scale: float = 1.0
    """Granite, Cohere"""
    softcap: float | None = None
    """Gemma 2 (arXiv 2408.00118)"""

    def __call__(self, hidden: Tensor) -> Tensor:
        return _bounded(self.module(hidden), self.scale, self.softcap)


class TokenLogps(NamedTuple):
    logps_C: Tensor
    """log p(target), float32 (float64 of float64)."""
    first_C: Tensor
    """Whether the target was the first choice."""
    square_C: Tensor | None = None
    """log sum_v p(v)^2, no gradient: what a token drawn from the model has for its mean probability (WPO)."""


def head_logps(
    head: Head, hidden_CH: Tensor, target_C: Tensor, chunk: int | None = None, *, squares: bool = False
) -> TokenLogps:
    """The tokens' log-probabilities; `square_C` only where `squares` asks for it."""
    module, device = head.module, hidden_CH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_CH.dtype
    if chunk is None:
        chunk = chunk_tokens(_vocabulary(module), _logit_bytes(dtype, device), cuda=device == "cuda")
    if type(module) not in (nn.Linear, Linear) or module._forward_pre_hooks or module._forward_hooks:
        return _by_checkpoint(head, hidden_CH, target_C, chunk, squares)
    if device == "cuda" and dtype != _sums(dtype):
        bounds = Bounds(head.scale, head.softcap)
        halves: tuple[Any, ...] = (hidden_CH, module.weight, module.bias, target_C, chunk, dtype, bounds, squares)
        return TokenLogps(*HalfHeadLogps.apply(*halves))  # type: ignore[no-untyped-call]
    kept = KEPT_LOGITS if torch.is_grad_enabled() and head.softcap is None and dtype == _sums(dtype) else 0
    options = _Options(chunk, dtype, head.scale, head.softcap, squares, kept)
    return TokenLogps(*_HeadLogps.apply(hidden_CH, module.weight, module.bias, target_C, options))  # type: ignore[no-untyped-call]


def logit_logps(logits_CV: Tensor, target_C: Tensor, *, squares: bool = False) -> TokenLogps:
    """The same from logits that are there already."""
    logits_CV = logits_CV.to(_sums(logits_CV.dtype))
    picked_C, sum_C = logits_CV.gather(1, target_C[:, None]).squeeze(1), logits_CV.logsumexp(1)
    square_C = (2 * logits_CV.detach()).logsumexp(1) - 2 * sum_C.detach() if squares else None
    return TokenLogps(picked_C - sum_C, picked_C >= logits_CV.detach().amax(1), square_C)


def _by_checkpoint(head: Head, hidden_CH: Tensor, target_C: Tensor, chunk: int, squares: bool) -> TokenLogps:
    """For heads that are more than a matrix: an adapter's, a sharded one."""

    def logps(hidden_KH: Tensor, target_K: Tensor) -> TokenLogps:
        return logit_logps(head(hidden_KH), target_K, squares=squares)

    chunks = zip(torch.split(hidden_CH, chunk), torch.split(target_C, chunk), strict=True)
    parts = [checkpoint(logps, hidden_KH, target_K, use_reentrant=False) for hidden_KH, target_K in chunks]
    return TokenLogps(
        torch.cat([part.logps_C for part in parts]),
        torch.cat([part.first_C for part in parts]),
        torch.cat([part.square_C for part in parts if part.square_C is not None]) if squares else None,
    )


def _logit_bytes(dtype: torch.dtype, device: str) -> int:
    """In all the types it exists in at one time."""
    sums = _sums(dtype).itemsize
    if dtype.itemsize == sums:
        return sums
    return dtype.itemsize if device == "cuda" else sums + dtype.itemsize


def _vocabulary(module: nn.Module) -> int:
    return int(getattr(module, "out_features", 0)) or 2**16


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _bounded(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _Options(NamedTuple):
    chunk: int
    dtype: torch.dtype
    """of the matrix products"""
    scale: float
    softcap: float | None
    squares: bool
    kept: int
    """Logits whose exponentials wait for the backward pass."""


class _HeadLogps(torch.autograd.Function):
    """With odds = exp(logits - their largest), p = odds / sum(odds) and g the gradient of a token's log-probability:

    d/d logits = g (1[target] - p).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_C: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        picked, tops, totals, first, squares = [], [], [], [], []
        kept: deque[Tensor] = deque()
        room = options.kept if any(ctx.needs_input_grad) else 0
        weight, bias = _cast(weight_VH, bias_V, options)
        scratch = _Scratch(hidden_CH.device)
        for rows in _chunks(len(target_C), options.chunk):
            logits_KV, target_K = _logits(hidden_CH[rows], weight, bias, options, scratch), target_C[rows]
            top_K, picked_K = logits_KV.amax(1), logits_KV.gather(1, target_K[:, None]).squeeze(1)
            picked.append(picked_K)
            first.append(picked_K >= top_K)
            odds_KV = logits_KV.sub_(top_K[:, None]).exp_()
            total_K = odds_KV.sum(1).log()
            tops.append(top_K)
            totals.append(total_K)
            if options.squares:
                squares.append(2 * (torch.linalg.vector_norm(odds_KV, dim=1).log() - total_K))
            room -= odds_KV.numel()
            if room >= 0:
                kept.append(odds_KV)
            del logits_KV, odds_KV  # or it would lie there until the next chunk is made
        top_C, total_C, first_C = torch.cat(tops), torch.cat(totals), torch.cat(first)
        square_C = torch.cat(squares) if options.squares else None
        ctx.save_for_backward(hidden_CH, weight_VH, bias_V, target_C, top_C, total_C)
        ctx.options, ctx.kept = options, kept
        ctx.mark_non_differentiable(*((first_C,) if square_C is None else (first_C, square_C)))
        return torch.cat(picked) - (top_C + total_C), first_C, square_C

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_C: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden_CH, weight_VH, bias_V, target_C, top_C, total_C = ctx.saved_tensors
        options: _Options = ctx.options
        kept, ctx.kept = ctx.kept, deque()  # they are overwritten: a second backward pass makes its own
        weight, bias = _cast(weight_VH, bias_V, options)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_CH) if want_hidden else None
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        scratch = _Scratch(hidden_CH.device)
        for rows in _chunks(len(target_C), options.chunk):
            slope_KV = None
            if kept:
                odds_KV = kept.popleft()
            else:
                logits_KV = _logits(hidden_CH[rows], weight, bias, options, scratch)
                slope_KV = None if options.softcap is None else 1 - (logits_KV / options.softcap).square()
                odds_KV = logits_KV.sub_(top_C[rows, None]).exp_()
                del logits_KV
            grad_KV = _grad_logits(odds_KV, total_C[rows], target_C[rows], grad_C[rows])
            if slope_KV is not None:
                grad_KV.mul_(slope_KV)
            if options.scale != 1.0:
                grad_KV.mul_(options.scale)
            del odds_KV, slope_KV
            if want_bias:
                grad_bias = grad_KV.sum(0) if grad_bias is None else grad_bias.add_(grad_KV.sum(0))
            grad_KV = scratch.cast("products", grad_KV, options.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = product(grad_KV, weight.T)
            if want_weight:
                grad_weight = _plus_product(grad_weight, grad_KV.T, hidden_CH[rows].to(options.dtype), scratch)
            del grad_KV
        return grad_hidden, _as(weight_VH, grad_weight), _as(bias_V, grad_bias), None, None


def _as(like: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return gradient if like is None or gradient is None else gradient.to(like.dtype)


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, tokens, chunk))


def _cast(weight_VH: Tensor, bias_V: Tensor | None, options: _Options) -> tuple[Tensor, Tensor | None]:
    return weight_VH.to(options.dtype), None if bias_V is None else bias_V.to(options.dtype)


class _Scratch:
    """Arrays that serve one chunk after the other. malloc would ask the system for the memory of each anew: that was a
    twelfth of a step in bfloat16."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}

    def empty(self, what: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns], where the last array of this name lay."""
        held = self._held.get(what)
        if held is None or held.numel() < rows * columns:
            held = self._held[what] = torch.empty(rows * columns, dtype=dtype, device=self._device)
        return held[: rows * columns].view(rows, columns)

    def cast(self, what: str, values_RC: Tensor, dtype: torch.dtype) -> Tensor:
        if values_RC.dtype == dtype:
            return values_RC
        rows, columns = values_RC.shape
        return self.empty(what, rows, columns, dtype).copy_(values_RC)


def _logits(
    hidden_KH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, options: _Options, scratch: _Scratch
) -> Tensor:
    """Of a chunk, until the next one's are made: the caller's to overwrite, and to keep if nothing was cast."""
    hidden_KH, sums = hidden_KH.to(options.dtype), _sums(options.dtype)
    if options.dtype == sums:
        logits_KV = product(hidden_KH, weight_VH, bias_V)
    else:
        made_KV = scratch.empty("products", len(hidden_KH), len(weight_VH), options.dtype)
        torch.mm(hidden_KH, weight_VH.T, out=made_KV)
        logits_KV = scratch.cast("sums", made_KV if bias_V is None else made_KV.add_(bias_V), sums)
    return _bounded(logits_KV, options.scale, options.softcap)


def _grad_logits(odds_KV: Tensor, total_K: Tensor, target_K: Tensor, grad_K: Tensor) -> Tensor:
    """Gradient with respect to the bounded logits, in place of the odds."""
    grad_KV = odds_KV.mul_((-grad_K * torch.exp(-total_K))[:, None])
    return grad_KV.scatter_add_(1, target_K[:, None], grad_K[:, None].to(grad_KV.dtype))


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, scratch: _Scratch) -> Tensor:
    """total + left @ right, in place of the total; the sum over chunks is float32 or better."""
    sums = _sums(left.dtype)
    if left.dtype == sums:
        return left @ right if total is None else total.addmm_(left, right)
    made = torch.mm(left, right, out=scratch.empty("weight", len(left), right.shape[1], left.dtype))
    return made.to(sums) if total is None else total.add_(made)
