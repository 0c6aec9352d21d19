"""The products of linear layers on the CPU in float32, by the faster of the two libraries that come with torch.

`torch.mm` calls MKL. oneDNN, by which torch multiplies bfloat16 already, is faster at `x W^T` and at the gradient of x:
on two cores of an AMD EPYC 200 to 210 against 150 to 190 GFLOP/s for a layer's shapes, and half as fast again for a
short chunk under the output head. The gradient of a weight, which sums over tokens, stays with MKL.

Shapes: T tokens, I, O features in and out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def product(states_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[T, O] = states weight^T + bias, outside autograd."""
    if not _by_onednn(states_TI, weight_OI):
        return F.linear(states_TI, weight_OI, bias_O)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(states_TI, weight_OI, bias_O, "none", [], "")
    return result


def use_fast_products(model: nn.Module) -> None:
    """Let the linear layers of `model` multiply so; one that is more than `nn.Linear` is left as it is.

    The class of a layer changes and nothing else of it: adapters, hooks, copies and names of weights stay as they are.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


class Linear(nn.Linear):
    """`nn.Linear`, multiplied by `product` where that differs."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not _by_onednn(input, self.weight):
            return super().forward(input)
        # Flat, so that what the function gives is no view: models may write into a layer's output.
        flat: Tensor = _Linear.apply(input.reshape(-1, input.shape[-1]), self.weight, self.bias)  # type: ignore[no-untyped-call]
        return flat.view(*input.shape[:-1], self.out_features)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(states_TI, weight_OI)
        return product(states_TI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        states_TI, weight_OI = ctx.saved_tensors
        want_states, want_weight, want_bias = ctx.needs_input_grad
        grad_states = product(grad_TO, weight_OI.T) if want_states else None
        grad_weight = grad_TO.T @ states_TI if want_weight else None
        return grad_states, grad_weight, grad_TO.sum(0) if want_bias else None


def _by_onednn(*tensors: Tensor) -> bool:
    return bool(torch.backends.mkldnn.enabled) and all(
        t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors
    )
