"""The output head in half precision on a GPU: logits exist in the arithmetic's type only, a chunk of tokens at a time.

    forward     chunk of hidden states @ W^T ─> logits (2 bytes) ─> one kernel: log of the sum, the target's, the top
    backward    the same product again ─> logits ─> one kernel, in place: their gradient ─> products with W and hidden

Under a frozen head the gradient's product with W is made in the forward pass, and the second line falls away.

The elementwise work reads a logit twice forward and once backward and writes its gradient: 8 bytes a logit beside the
products' own 6, where `head.py`'s, which is for CPUs, moves 72. `statistics` and `slopes` are compiled on a GPU; sums
are float32.

Shapes: C completion tokens, K tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Bounds(NamedTuple):
    """bounded(x) = softcap * tanh(scale x / softcap), or scale x."""

    scale: float
    softcap: float | None


class HalfHeadLogps(torch.autograd.Function):
    """As `head._HeadLogps`: log-probabilities of the targets, whether they were the first choice, and `square_C`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_C: Tensor,
        chunk: int,
        dtype: torch.dtype,
        bounds: Bounds,
        squares: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        weight, bias = weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
        parts = []
        # Each token's gradient is linear in that of its log-probability, so a frozen head's product with it is made
        # here, for a gradient of one, and the logits need not be made again.
        slope_CH = torch.empty_like(hidden_CH) if ctx.needs_input_grad[:3] == (True, False, False) else None
        ones_C = torch.ones(len(target_C), device=hidden_CH.device) if slope_CH is not None else None
        logits_KV = hidden_CH.new_empty(min(chunk, len(target_C)), len(weight), dtype=dtype)
        for rows in _chunks(len(target_C), chunk):
            _logits(hidden_CH[rows].to(dtype), weight, bias, out := logits_KV[: len(target_C[rows])])
            parts.append(_run(statistics, out, target_C[rows], bounds, squares))
            if slope_CH is not None and ones_C is not None:
                _run(slopes, out, target_C[rows], parts[-1][1], ones_C[rows], bounds)
                slope_CH[rows] = out @ weight
        picked_C, total_C, first_C, square_C = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(
            *((slope_CH,) if slope_CH is not None else (hidden_CH, weight_VH, bias_V, target_C, total_C))
        )
        ctx.options = (chunk, dtype, bounds)
        ctx.mark_non_differentiable(first_C, square_C)
        return picked_C - total_C, first_C, square_C if squares else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_C: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            (slope_CH,) = ctx.saved_tensors
            return (slope_CH * grad_C[:, None]).to(slope_CH.dtype), *[None] * 7
        hidden_CH, weight_VH, bias_V, target_C, total_C = ctx.saved_tensors
        chunk, dtype, bounds = ctx.options
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        weight, bias = weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
        grad_hidden = torch.empty_like(hidden_CH) if want_hidden else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if want_weight else None
        grad_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if want_bias else None
        logits_KV = hidden_CH.new_empty(min(chunk, len(target_C)), len(weight), dtype=dtype)
        for rows in _chunks(len(target_C), chunk):
            hidden_KH = hidden_CH[rows].to(dtype)
            _logits(hidden_KH, weight, bias, grad_KV := logits_KV[: len(hidden_KH)])
            _run(slopes, grad_KV, target_C[rows], total_C[rows], grad_C[rows], bounds)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_KV @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_KV.T, hidden_KH)
            if grad_bias is not None:
                grad_bias += grad_KV.sum(0, dtype=torch.float32)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VH.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
            *[None] * 5,
        )


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def _logits(hidden_KH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, out_KV: Tensor) -> None:
    torch.mm(hidden_KH, weight_VH.T, out=out_KV)
    if bias_V is not None:
        out_KV += bias_V


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, float32; on a GPU without an array for the product."""
    if total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


def statistics(
    logits_KV: Tensor, target_K: Tensor, bounds: Bounds, squares: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The target's logit, log of the sum of exponentials, whether the target was the first choice, and with `squares`
    log sum_v p(v)^2 (zeros without)."""
    values_KV = _bounded(logits_KV.float(), bounds)
    top_K = values_KV.amax(1)
    odds_KV = (values_KV - top_K[:, None]).exp()
    sum_K = odds_KV.sum(1)
    picked_K = _bounded(logits_KV.gather(1, target_K[:, None]).squeeze(1).float(), bounds)
    square_K = odds_KV.square().sum(1).log() - 2 * sum_K.log() if squares else torch.zeros_like(sum_K)
    return picked_K, top_K + sum_K.log(), picked_K >= top_K, square_K


def slopes(logits_KV: Tensor, target_K: Tensor, total_K: Tensor, grad_K: Tensor, bounds: Bounds) -> None:
    """In place of the logits, the gradient with respect to them: g (1[target] - p), through the bounds."""
    values_KV = _bounded(logits_KV.float(), bounds)
    places_V = torch.arange(logits_KV.shape[1], device=logits_KV.device)
    chosen_KV = (places_V[None] == target_K[:, None]).float()
    slope_KV = (chosen_KV - (values_KV - total_K[:, None]).exp()) * (grad_K[:, None] * bounds.scale)
    if bounds.softcap is not None:
        slope_KV = slope_KV * (1 - (values_KV / bounds.softcap).square())
    logits_KV.copy_(slope_KV)


def _bounded(values: Tensor, bounds: Bounds) -> Tensor:
    if bounds.scale != 1.0:
        values = values * bounds.scale
    return values if bounds.softcap is None else bounds.softcap * torch.tanh(values / bounds.softcap)


def _run(function: Callable[..., Any], logits_KV: Tensor, *arguments: Any) -> Any:
    """`function`, compiled once for any K where the logits lie on a GPU; on a CPU that costs more than it gives."""
    if not logits_KV.is_cuda:
        return function(logits_KV, *arguments)
    for tensor in (logits_KV, *arguments):
        if isinstance(tensor, Tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(function)(logits_KV, *arguments)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
