"""Linear layers multiplied by the faster library give what `nn.Linear` gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_service.train.policy import load_model
from dpo_service.train.products import Linear, product, use_fast_products


class Called(TorchDispatchMode):
    """The names of the operations that run within."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


def results(layer: nn.Linear, states: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input, of the weight, of the bias."""
    states = states.clone().requires_grad_()
    layer.zero_grad()
    output = layer(states)
    output.square().sum().backward()
    return [output.detach(), states.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1, 5, 7), (2, 3, 7)])
def test_a_layer_gives_what_torchs_own_gives(shape, bias):
    torch.manual_seed(0)
    plain = nn.Linear(7, 11, bias=bias)
    fast = copy.deepcopy(plain)
    use_fast_products(fast)
    assert type(fast) is Linear
    states = torch.randn(shape)
    for found, expected in zip(results(fast, states), results(plain, states), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient_and_pass_one_on():
    layer = nn.Linear(4, 3).requires_grad_(False)
    use_fast_products(layer)
    states = torch.randn(2, 4, requires_grad=True)
    layer(states).sum().backward()
    torch.testing.assert_close(states.grad, layer.weight.sum(0).expand(2, 4))
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_torchs_own(dtype):
    layer = nn.Linear(4, 3).to(dtype)
    states = torch.randn(2, 4, dtype=dtype)
    expected = layer(states)
    use_fast_products(layer)
    assert torch.equal(layer(states), expected)
    assert torch.equal(product(states, layer.weight, layer.bias), expected)


def test_autocast_computes_in_half_precision():
    layer = nn.Linear(4, 3)
    use_fast_products(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16


def test_what_is_more_than_a_linear_layer_is_left():
    class Scaled(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "more": Scaled(2, 2)})
    names = list(model.state_dict())
    use_fast_products(model)
    assert type(model["more"]) is Scaled
    assert type(model["plain"]) is Linear
    assert list(model.state_dict()) == names


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_a_loaded_model_multiplies_so_forward_and_backward(model_dir):
    model = load_model(model_dir)
    with Called() as forward:
        loss = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).logits.sum()
    with Called() as backward:
        loss.backward()
    assert "mkldnn._linear_pointwise" in forward.names & backward.names
    assert "aten.addmm" not in forward.names | backward.names


def written_over(layer, states):
    """What a model does that writes into a layer's output: Gemma 3n's AltUp."""
    states = states.clone().requires_grad_()
    output = layer(states)
    output.clamp_(-0.5, 0.5)
    output[..., 0] += 1
    output.square().sum().backward()
    return [output.detach(), states.grad, layer.weight.grad]


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
def test_an_output_may_be_written_into(shape):
    torch.manual_seed(0)
    plain = nn.Linear(7, 11, bias=False)
    fast = copy.deepcopy(plain)
    use_fast_products(fast)
    states = torch.randn(shape)
    for found, expected in zip(written_over(fast, states), written_over(plain, states), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_no_tokens_are_multiplied_too(shape):
    """A mixture gives an expert that nobody chose a batch of none."""
    fast, plain = nn.Linear(7, 11), nn.Linear(7, 11)
    use_fast_products(fast)
    for found, expected in zip(
        written_over(fast, torch.empty(shape)), written_over(plain, torch.empty(shape)), strict=True
    ):
        assert torch.equal(found, expected)
