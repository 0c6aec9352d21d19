"""Losses: golden values, identities, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_service.specs.method import METHODS, LossSpec
from dpo_service.train.losses import DIVISOR, LOSSES, LossInputs, sft, sigmoid


def inputs(chosen, rejected, ref_chosen, ref_rejected):
    return LossInputs(
        chosen_P=chosen,
        chosen_tokens_P=torch.full_like(chosen, 3),
        rejected_P=rejected,
        rejected_tokens_P=torch.full_like(rejected, 3),
        ref_chosen_P=ref_chosen,
        ref_rejected_P=ref_rejected,
    )


def golden():
    """h = (-10 + 12) - (-20 + 15) = 7 and h = (-3 + 3) - (-4 + 9) = -5."""
    columns = ([-10.0, -3.0], [-20.0, -4.0], [-12.0, -3.0], [-15.0, -9.0])
    return inputs(*(torch.tensor(column, dtype=torch.float64) for column in columns))


def test_every_method_has_its_loss():
    assert {row.loss for row in METHODS.values()} == set(LOSSES) == set(DIVISOR)


def test_sigmoid_golden():
    loss_P = sigmoid(golden(), LossSpec(name="sigmoid", beta=0.1))
    expected = [math.log1p(math.exp(-0.7)), math.log1p(math.exp(0.5))]
    assert loss_P.tolist() == pytest.approx(expected, rel=1e-12)
    assert loss_P.tolist() == pytest.approx([0.403186, 0.974077], abs=1e-6)


def test_label_smoothing_golden():
    loss_P = sigmoid(golden(), LossSpec(name="sigmoid", beta=0.1, label_smoothing=0.2))
    assert loss_P.tolist() == pytest.approx(
        [0.8 * 0.403186 + 0.2 * 1.103186, 0.8 * 0.974077 + 0.2 * 0.474077], abs=1e-6
    )


def test_sft_is_the_negative_log_likelihood():
    answers = LossInputs(chosen_P=torch.tensor([-2.5, -7.0]), chosen_tokens_P=torch.tensor([2, 5]))
    assert sft(answers, LossSpec(name="sft")).tolist() == [2.5, 7.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_policy_that_is_the_reference_has_loss_ln_2(smoothing):
    logps = torch.randn(5) * 50
    same = inputs(logps, logps - 3, logps, logps - 3)
    loss_P = sigmoid(same, LossSpec(name="sigmoid", label_smoothing=smoothing))
    assert torch.allclose(loss_P, torch.full((5,), math.log(2)), atol=1e-6)


def test_extreme_margins_stay_finite():
    far = torch.tensor([1e4, -1e4])
    zero = torch.zeros(2, requires_grad=True)
    loss_P = sigmoid(inputs(far + zero, zero, zero.detach(), zero.detach()), LossSpec(name="sigmoid", beta=1.0))
    loss_P.sum().backward()
    assert torch.isfinite(loss_P).all()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_of_sigmoid(smoothing):
    spec = LossSpec(name="sigmoid", beta=0.3, label_smoothing=smoothing)
    columns = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *c: sigmoid(inputs(*c), spec), columns)


def test_gradient_of_sft():
    chosen = torch.randn(4, dtype=torch.float64, requires_grad=True)
    tokens = torch.ones(4)
    assert torch.autograd.gradcheck(lambda c: sft(LossInputs(c, tokens), LossSpec(name="sft")), [chosen])


def test_loss_without_its_inputs_is_refused():
    with pytest.raises(AssertionError, match="pairs"):
        sigmoid(LossInputs(torch.zeros(1), torch.ones(1)), LossSpec(name="sigmoid"))
