"""The head for half precision on GPUs, on the CPU: log-probabilities and gradients of the plain head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dpo_service.train import half_head
from dpo_service.train.half_head import Bounds, HalfHeadLogps

C, H, V = 11, 16, 37


def plain(hidden, weight, bias, target, bounds):
    logits = F.linear(hidden, weight, bias) * bounds.scale
    if bounds.softcap is not None:
        logits = bounds.softcap * torch.tanh(logits / bounds.softcap)
    logps = logits.log_softmax(-1)
    return logps.gather(1, target[:, None]).squeeze(1), logits.argmax(-1) == target, (2 * logps).logsumexp(-1)


def leaves(bias):
    torch.manual_seed(0)
    hidden = torch.randn(C, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randn(V, dtype=torch.float64, requires_grad=True) if bias else None


@pytest.mark.parametrize("chunk", [3, 11, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bounds", [Bounds(1.0, None), Bounds(0.5, None), Bounds(1.0, 2.0), Bounds(0.25, 3.0)])
def test_values_and_gradients(bounds, bias, chunk):
    """In float32, to its rounding; in bfloat16 the arithmetic is the same function."""
    target, tensors = torch.randint(0, V, (C,)), leaves(bias)
    weights_C = torch.randn(C, dtype=torch.float64)
    expected = plain(*tensors, target, bounds)
    singles = [None if t is None else t.detach().float().requires_grad_() for t in tensors]
    found = HalfHeadLogps.apply(*singles, target, chunk, torch.float32, bounds, True)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine.double(), theirs.double(), atol=1e-4)
    present = [t for t in tensors if t is not None]
    gradients = torch.autograd.grad((expected[0] * weights_C).sum(), present)
    own = torch.autograd.grad((found[0] * weights_C.float()).sum(), [t for t in singles if t is not None])
    for mine, theirs in zip(own, gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_bfloat16_is_near_and_its_gradients_have_their_weights_types():
    target, (hidden, weight, _) = torch.randint(0, V, (C,)), leaves(False)
    expected = plain(hidden, weight, None, target, Bounds(1.0, None))[0]
    singles = [hidden.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_()]
    found, first, square = HalfHeadLogps.apply(*singles, None, target, 4, torch.bfloat16, Bounds(1.0, None), False)
    assert (found - expected).norm() <= 1e-2 * expected.norm()
    assert (found.dtype, first.dtype, square) == (torch.float32, torch.bool, None)
    found.sum().backward()
    assert [t.grad.dtype for t in singles] == [torch.bfloat16, torch.float32]
    assert (singles[1].grad - torch.autograd.grad(expected.sum(), weight)[0]).norm() <= 0.05 * singles[1].grad.norm()


@pytest.mark.parametrize("bounds", [Bounds(1.0, None), Bounds(0.5, 3.0)])
def test_under_a_frozen_head_the_gradient_is_ready_before_the_backward_pass(bounds, monkeypatch):
    target, (hidden, weight, bias) = torch.randint(0, V, (C,)), leaves(True)
    weights_C = torch.randn(C, dtype=torch.float64)
    (expected,) = torch.autograd.grad((plain(hidden, weight, bias, target, bounds)[0] * weights_C).sum(), hidden)
    own = hidden.detach().float().requires_grad_()
    frozen = weight.detach().float(), bias.detach().float()
    found, *_ = HalfHeadLogps.apply(own, *frozen, target, 4, torch.float32, bounds, False)
    monkeypatch.setattr(half_head, "_logits", None)  # none are made again
    (found * weights_C.float()).sum().backward()
    assert (own.grad - expected).norm() <= 1e-5 * expected.norm()
