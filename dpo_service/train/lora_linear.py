"""A linear layer under a LoRA adapter (arXiv 2106.09685), with two thin products more than without one:

    h = x A^T                   [T, R]
    y = x W^T + s h B^T         [T, O], the second product added where the first one lies

    gh = s gy B                 gx = gy W + gh A (added in place)      gB = s gy^T h      gA = gh^T x

peft's own layer casts x to the adapter's float32 and the products back, and gives B's product an array of its own: in
bfloat16 six more passes over arrays as large as the layer's input and output, which on a GPU cost as much as a quarter
of the product with W. The arithmetic here is that of the layer (autocast's type, or the weights'); the adapter's
weights and their gradients are float32.

Shapes: T tokens, I, O features in and out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from dpo_service.train import products
from dpo_service.train.products import product


class LoraLinear(lora.Linear):  # type: ignore[misc]  # peft has no types
    """peft's layer, computed as above where it is a plain one: one adapter, switched on, whose dropout is off."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else self._plain_adapter()
        if name is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        weights = (self.base_layer.weight, self.base_layer.bias, self.lora_A[name].weight, self.lora_B[name].weight)
        cast = [None if weight is None else weight.to(dtype) for weight in weights]
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        result: Tensor = lora_linear(flat, *cast, float(self.scaling[name]))[0]
        return result.view(*x.shape[:-1], self.out_features)

    def _plain_adapter(self) -> str | None:
        """The adapter's name; None where the layer is anything more."""
        base, names = self.base_layer, self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] in self.lora_variant:
            return None
        (name,) = names
        if name not in self.lora_A or self.lora_B[name].bias is not None:
            return None
        dropout = self.lora_dropout[name]
        drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        return None if drops or type(base) not in (nn.Linear, products.Linear) else name


@torch.library.custom_op("dpo_service::lora_linear", mutates_args=())
def lora_linear(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """y [T, O] and h [T, R], all of one type. An operator of its own, so that a compiler leaves the sum in place."""
    hidden_TR = x_TI @ a_RI.T
    return product(x_TI, weight_OI, bias_O).addmm_(hidden_TR, b_OR.T, alpha=scale), hidden_TR


@lora_linear.register_fake
def _(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    # Not len(): it would make a compiler's symbol a number, and every length of a row a graph of its own.
    return x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0]), x_TI.new_empty(x_TI.shape[0], a_RI.shape[0])


@torch.library.custom_op("dpo_service::lora_linear_input_grad", mutates_args=())
def _input_grad(grad_TO: Tensor, weight_OI: Tensor, grad_hidden_TR: Tensor, a_RI: Tensor) -> Tensor:
    return product(grad_TO, weight_OI.T).addmm_(grad_hidden_TR, a_RI)


@_input_grad.register_fake
def _(grad_TO: Tensor, weight_OI: Tensor, grad_hidden_TR: Tensor, a_RI: Tensor) -> Tensor:
    return grad_TO.new_empty(grad_TO.shape[0], weight_OI.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TI, weight_OI, bias_O, a_RI, b_OR, ctx.scale = inputs
    assert bias_O is None or not bias_O.requires_grad, "peft freezes the layer under an adapter"
    ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR, output[1])


def _backward(ctx: Any, grad_TO: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x_TI, weight_OI, a_RI, b_OR, hidden_TR = ctx.saved_tensors
    grad_TO = grad_TO.contiguous()
    grad_hidden_TR = (grad_TO @ b_OR) * ctx.scale
    grad_x = _input_grad(grad_TO, weight_OI, grad_hidden_TR, a_RI) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, grad_hidden_TR.T @ x_TI, (grad_TO.T @ hidden_TR) * ctx.scale, None


lora_linear.register_autograd(_backward, setup_context=_save)


Size = tuple[int, int]


@register_flop_formula(torch.ops.dpo_service.lora_linear)
def _forward_flops(x: Size, weight: Size, bias: object, a: Size, b: Size, *_: object, **__: object) -> int:
    (tokens, inputs), outputs, rank = x, weight[0], a[0]
    return 2 * tokens * (inputs * outputs + rank * (inputs + outputs))


@register_flop_formula(torch.ops.dpo_service.lora_linear_input_grad)
def _input_grad_flops(grad: Size, weight: Size, grad_hidden: Size, a: Size, *_: object, **__: object) -> int:
    (tokens, outputs), (rank, inputs) = grad, a
    return 2 * tokens * inputs * (outputs + rank)
