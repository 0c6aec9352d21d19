"""The adapter's layer gives what peft's own gives: outputs, gradients, compiled or not, fresh or loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

from dpo_service.specs.adapter import LoraSpec
from dpo_service.train.lora_linear import LoraLinear
from dpo_service.train.policy import add_adapter, load_adapter, load_model
from tests.unit.train.training_kit import build_model

IN, OUT, RANK = 24, 40, 4


class Net(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=bias)

    def forward(self, x):
        return self.layer(x)


def adapted(bias=False, own=True, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["layer"], init_lora_weights=False, **options)
    if own:
        config._register_custom_module({nn.Linear: LoraLinear})
    return get_peft_model(Net(bias), config).eval()


def results(model, x, precision):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        output = model(x)
    output.float().square().sum().backward()
    return [output, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_outputs_and_gradients_are_pefts(bias, precision, tolerance):
    ours, peers = adapted(bias), adapted(bias, own=False)
    peers.load_state_dict(ours.state_dict())
    assert type(ours.base_model.model.layer) is LoraLinear
    assert type(peers.base_model.model.layer) is lora.Linear
    x = torch.randn(2, 7, IN)
    for mine, theirs in zip(results(ours, x, precision), results(peers, x, precision), strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN)])
def test_no_tokens_are_a_batch_too(shape):
    for mine, theirs in zip(
        *(results(adapted(own=own), torch.empty(shape), "float32") for own in (True, False)), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_an_output_may_be_written_into():
    def written_over(model):
        x = torch.linspace(-1, 1, 14 * IN).view(2, 7, IN).requires_grad_()
        output = model(x)
        output.clamp_(-0.5, 0.5)
        output[..., 0] += 1
        output.square().sum().backward()
        return [output, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    for mine, theirs in zip(written_over(adapted()), written_over(adapted(own=False)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_frozen_layer_in_bfloat16_leaves_the_adapter_and_its_gradients_in_float32():
    ours = adapted()
    ours.base_model.model.layer.base_layer.to(torch.bfloat16)
    output, _, grad_a, grad_b = results(ours, torch.randn(5, IN).bfloat16(), "float32")
    assert (output.dtype, grad_a.dtype, grad_b.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_gradcheck():
    ours = adapted(bias=True).double()
    layer = ours.base_model.model.layer
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    def function(x, a, b):
        return torch.ops.dpo_service.lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, a, b, 1.5)[0]

    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *weights))


def test_one_graph_when_compiled():
    ours = adapted()
    x = torch.randn(6, IN)
    expected = results(ours, x, "float32")
    ours.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(ours.base_model.model, backend="aot_eager", fullgraph=True)
    found = results(compiled, x, "float32")
    torch._dynamo.reset()
    for mine, theirs in zip(found, [*expected[:2], *expected[2:]], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_an_adapter_that_is_more_is_pefts_to_compute(options):
    ours, peers = adapted(**options), adapted(own=False, **options)
    peers.load_state_dict(ours.state_dict())
    for model in (ours, peers):
        model.train()
    x, outputs = torch.randn(4, IN), []
    for model in (ours, peers):
        torch.manual_seed(1)
        outputs.append(model(x))
    assert torch.equal(*outputs)


def test_switched_off_it_is_the_layer():
    ours = adapted()
    x = torch.randn(3, IN)
    with ours.disable_adapter():
        assert torch.equal(ours(x), ours.base_model.model.layer.base_layer(x))


def test_a_policy_has_it_fresh_and_loaded(tmp_path):
    base = build_model(tmp_path / "model")
    policy = add_adapter(load_model(base), LoraSpec(rank=2), 0)
    kinds = {type(module) for module in policy.modules() if isinstance(module, lora.Linear)}
    assert kinds == {LoraLinear}
    policy.save_pretrained(tmp_path / "adapter")
    again = load_adapter(load_model(base), tmp_path / "adapter")
    assert {type(module) for module in again.modules() if isinstance(module, lora.Linear)} == {LoraLinear}
    assert all(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)
    copied = copy.deepcopy(again)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(copied(ids).logits, policy(ids).logits)
