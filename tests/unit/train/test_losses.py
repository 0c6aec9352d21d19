"""Losses: golden values, identities, signs, gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dpo_service.specs.loss import LOSS_TABLE, LossSpec, mixed
from dpo_service.train.losses import (
    DIVISOR,
    LOSSES,
    LossInputs,
    log1mexp,
    pair_weights,
    rewards,
    row_losses,
    sigmoid,
)

CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = [-10.0, -3.0], [-20.0, -4.0], [-12.0, -3.0], [-15.0, -9.0]
N_CHOSEN, N_REJECTED = [4, 2], [5, 8]
CHOSEN_TAIL, REJECTED_TAIL, WEIGHTS = [0.0, -1.0], [-2.0, 0.0], [0.5, 0.25]
PAIRED = sorted(set(LOSSES) - {"sft", "kto"})
LOGISTIC = ("sigmoid", "robust", "sigmoid_norm")


def inputs(chosen, rejected, ref_chosen, ref_rejected, *, n_chosen=3, n_rejected=3):
    return LossInputs(
        chosen_P=chosen,
        chosen_tokens_P=torch.zeros_like(chosen, dtype=torch.int64) + torch.as_tensor(n_chosen),
        rejected_P=rejected,
        rejected_tokens_P=torch.zeros_like(rejected, dtype=torch.int64) + torch.as_tensor(n_rejected),
        ref_chosen_P=ref_chosen,
        ref_rejected_P=ref_rejected,
    )


def golden():
    """D_w = 2, 0; D_l = -5, 5; h = 7, -5; per token D_w = .5, 0; D_l = -1, .625; lp_w = -2.5, -1.5; lp_l = -4, -.5.

    Without the tails D_w = 2, 1; D_l = -3, 5; h = 5, -4. Unpaired: D_w, the first desirable, the
    other not (or P_w = 1 and 0); z = 1/2.
    """
    columns = (torch.tensor(column, dtype=torch.float64) for column in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED))
    tails = {"chosen_tail_P": CHOSEN_TAIL, "rejected_tail_P": REJECTED_TAIL, "weight_P": WEIGHTS}
    more = {name: torch.tensor(column, dtype=torch.float64) for name, column in tails.items()}
    labels = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return replace(inputs(*columns, n_chosen=N_CHOSEN, n_rejected=N_REJECTED), **more, label_P=labels, baseline=0.5)


def s(x):
    return 1 / (1 + math.exp(-x))


def log_s(x):
    return -math.log(1 + math.exp(-x))


def log_odds(a):
    p = math.exp(a)
    return math.log(p / (1 - p))


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def smoothed(margin, e):
    return -(1 - e) * log_s(margin) - e * log_s(-margin)


def lrml(x, tau):
    m = s(x / tau)
    return -(1 - m) * log_s(x) + m * math.exp(-x)


GOLDEN = [
    ("sigmoid", {}, [-log_s(0.7), -log_s(-0.5)]),
    ("sigmoid", {"beta": 0.2, "label_smoothing": 0.2}, [smoothed(1.4, 0.2), smoothed(-1.0, 0.2)]),
    ("sigmoid", {"length_penalty": 0.05}, [-log_s(0.7 - 0.05), -log_s(-0.5 - 0.3)]),
    ("sigmoid", {"rpo_alpha": 2.0}, [-log_s(0.7) + 5.0, -log_s(-0.5) + 3.0]),
    ("sigmoid", {"ld_alpha": 0.0}, [-log_s(0.5), -log_s(-0.4)]),
    ("sigmoid", {"ld_alpha": 0.25, "rpo_alpha": 1.0}, [-log_s(0.55) + 2.5, -log_s(-0.425) + 1.5]),
    ("sigmoid", {"wpo": True, "rpo_alpha": 2.0}, [(-log_s(0.7) + 5.0) / 2, (-log_s(-0.5) + 3.0) / 4]),
    (
        "nca_pair",
        {"beta": 1.0, "ld_alpha": 0.0},
        [-log_s(w) - log_s(-w) / 2 - log_s(-x) / 2 for w, x in ((2, -3), (1, 5))],
    ),
    ("sppo", {"beta": 0.25, "ld_alpha": 0.0}, [(0 + 1) / 2, (3**2 + 3**2) / 2]),
    ("ipo", {"wpo": True}, [3.5**2 / 2, 5.625**2 / 4]),
    ("simpo", {"wpo": True}, [-log_s(2) / 2, -log_s(-3) / 4]),
    ("robust", {}, [(0.1 * log_s(-h) - 0.9 * log_s(h)) / 0.8 for h in (0.7, -0.5)]),
    ("robust", {"label_smoothing": 0.25}, [(0.25 * log_s(-h) - 0.75 * log_s(h)) / 0.5 for h in (0.7, -0.5)]),
    ("hinge", {}, [0.3, 1.5]),
    ("hinge", {"beta": 0.2, "length_penalty": 0.5}, [1 - 1.4 + 0.5, 1 + 1.0 + 3.0]),
    ("ipo", {}, [(1.5 - 5) ** 2, (-0.625 - 5) ** 2]),
    ("ipo", {"length_normalize": False, "beta": 0.25}, [(7 - 2) ** 2, (-5 - 2) ** 2]),
    ("ipo", {"rpo_alpha": 1.0}, [3.5**2 + 2.5, 5.625**2 + 1.5]),
    ("sigmoid_norm", {}, [-log_s(7.5), -log_s(-3.125)]),
    ("exo_pair", {}, [kl((s(0.7), s(-0.7)), (0.999, 0.001)), kl((s(-0.5), s(0.5)), (0.999, 0.001))]),
    ("exo_pair", {"label_smoothing": 0.3}, [kl((s(0.7), s(-0.7)), (0.7, 0.3)), kl((s(-0.5), s(0.5)), (0.7, 0.3))]),
    ("nca_pair", {"beta": 0.1}, [-log_s(w) - log_s(-w) / 2 - log_s(-x) / 2 for w, x in ((0.2, -0.5), (0.0, 0.5))]),
    ("bco_pair", {}, [-log_s(0.2 - 0.05) - log_s(0.5 + 0.05), -log_s(-0.05) - log_s(-0.5 + 0.05)]),
    ("bco_pair", {"beta": 1.0, "ld_alpha": 0.0}, [-log_s(1.5) - log_s(3.5), -log_s(0.5) - log_s(-4.5)]),
    ("sppo", {"beta": 0.25, "rpo_alpha": 1.0}, [(0 + 3**2) / 2 + 2.5, ((0 + 2) ** 2 + (5 - 2) ** 2) / 2 + 1.5]),
    ("apo_zero", {}, [1 - s(0.2) + s(-0.5), 0.5 + s(0.5)]),
    ("apo_down", {}, [s(0.2) + 1 - s(0.7), 0.5 + 1 - s(-0.5)]),
    ("discopop", {}, [lrml(0.7, 0.05), lrml(-0.5, 0.05)]),
    ("discopop", {"beta": 0.01, "discopop_tau": 0.5}, [lrml(0.07, 0.5), lrml(-0.05, 0.5)]),
    ("sppo", {}, [(498**2 + 495**2) / 2, (500**2 + 495**2) / 2]),
    ("sppo", {"beta": 0.25}, [(0 + 3**2) / 2, (2**2 + 3**2) / 2]),
    ("orpo", {}, [-w - 0.1 * log_s(log_odds(a) - log_odds(b)) for w, a, b in ((-2.5, -2.5, -4), (-1.5, -1.5, -0.5))]),
    ("orpo", {"lam": 1.5}, [-a - 1.5 * log_s(log_odds(a) - log_odds(b)) for a, b in ((-2.5, -4), (-1.5, -0.5))]),
    ("simpo", {}, [-log_s(2 * 1.5 - 1), -log_s(-2 * 1 - 1)]),
    ("simpo", {"beta": 10.0, "gamma_beta_ratio": 0.1}, [-log_s(15 - 1), -log_s(-10 - 1)]),
    ("kto", {}, [s(-0.1 * (2 - 0.5)), s(0.1 * (0 - 0.5))]),
    ("kto", {"beta": 1.0, "desirable_weight": 3.0, "undesirable_weight": 2.0}, [3 * s(-1.5), 2 * s(-0.5)]),
    ("sft", {}, [10.0, 3.0]),
]


@pytest.mark.parametrize(("name", "numbers", "expected"), GOLDEN, ids=lambda value: str(value)[:40])
def test_golden(name, numbers, expected):
    assert row_losses(golden(), LossSpec(name=name, **numbers)).tolist() == pytest.approx(expected, rel=1e-12)


def test_golden_written_out():
    """The same from figures, should the formulas above share a mistake with the code."""
    assert row_losses(golden(), LossSpec(name="sigmoid")).tolist() == pytest.approx([0.403186, 0.974077], abs=1e-6)
    assert row_losses(golden(), LossSpec(name="simpo")).tolist() == pytest.approx([0.126928, 3.048587], abs=1e-6)
    assert row_losses(golden(), LossSpec(name="apo_zero")).tolist() == pytest.approx([0.827707, 1.122459], abs=1e-6)


def test_every_loss_of_the_table_is_there_and_tested():
    assert set(LOSS_TABLE) == set(LOSSES) == set(DIVISOR) == {name for name, _, _ in GOLDEN}


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("name", LOGISTIC)
def test_policy_that_is_the_reference_has_loss_ln_2(name, smoothing):
    logps = torch.randn(5) * 50
    same = inputs(logps, logps - 3, logps, logps - 3)
    numbers = {"label_smoothing": smoothing} if "label_smoothing" in LOSS_TABLE[name].options else {}
    assert torch.allclose(row_losses(same, LossSpec(name=name, **numbers)), torch.tensor(math.log(2)), atol=1e-6)


def slopes(name, chosen=0.0, rejected=0.0, **numbers):
    """d loss / d lp of the chosen and of the rejected answer, at these D."""
    columns = [torch.tensor([value - 6.0], dtype=torch.float64, requires_grad=True) for value in (chosen, rejected)]
    at = torch.full((1,), -6.0, dtype=torch.float64)
    loss_P = row_losses(inputs(*columns, at, at), LossSpec(name=name, **numbers))
    return [float(slope) for slope in torch.autograd.grad(loss_P.sum(), columns)]


@pytest.mark.parametrize("name", sorted(set(PAIRED) - {"apo_down", "discopop"}))
def test_the_chosen_answer_is_pushed_up_and_the_rejected_down(name):
    chosen, rejected = slopes(name)
    assert chosen < 0 < rejected


def test_apo_down_pushes_both_down_and_the_rejected_one_further():
    chosen, rejected = slopes("apo_down", chosen=3, rejected=-3, beta=0.5)
    assert chosen > 0
    assert rejected > 0
    assert slopes("apo_down")[0] == pytest.approx(0), "at the reference only the rejected answer moves"
    assert slopes("apo_down")[1] > 0.02


@pytest.mark.parametrize("h", [-50.0, -20.0, 20.0, 50.0])
def test_discopop_pushes_apart_outside_of_its_bump(h):
    chosen, rejected = slopes("discopop", chosen=h)
    assert chosen < 0 < rejected
    assert slopes("discopop")[0] > 0, "inside of it the authors' loss rises"


def test_a_longer_chosen_answer_pushes_less_under_the_length_penalty():
    def push(n_chosen, penalty):
        chosen = torch.zeros(1, requires_grad=True)
        zero = torch.zeros(1)
        spec = LossSpec(name="sigmoid", length_penalty=penalty)
        sigmoid(inputs(chosen, zero, zero, zero, n_chosen=n_chosen, n_rejected=10), spec).backward()
        return -float(chosen.grad)

    assert push(30, 0.1) < push(10, 0.1) < push(5, 0.1)
    assert push(30, 0.0) == push(10, 0.0) == push(10, 0.1)


def test_sppo_takes_verdicts_where_there_are_no_probabilities():
    verdicts, soft = replace(golden(), label_P=None), replace(golden(), label_P=torch.tensor([0.75, 0.5]))
    spec = LossSpec(name="sppo", beta=0.25)
    assert row_losses(verdicts, spec).tolist() == pytest.approx([(0 + 3**2) / 2, (2**2 + 7**2) / 2])
    assert row_losses(soft, spec).tolist() == pytest.approx([((2 - 1) ** 2 + (-5 + 1) ** 2) / 2, 5**2 / 2])


def test_bco_is_two_ln_2_where_rewards_are_their_mean():
    same = torch.zeros(3)
    at = replace(inputs(same, same, same - 7, same - 7), baseline=torch.tensor(7.0))
    assert torch.allclose(row_losses(at, LossSpec(name="bco_pair")), torch.tensor(2 * math.log(2)))


MIX = {"sigmoid": 0.8, "bco_pair": 0.25, "sft": 0.5}


def test_a_mix_is_the_weighted_sum():
    """By hand at beta 0.1: 0.8 * 0.403186 + 0.25 * bco + 0.5 * 2.5, and so on."""
    bco = [-log_s(0.2 - 0.05) - log_s(0.5 + 0.05), -log_s(-0.05) - log_s(-0.5 + 0.05)]
    expected = [0.8 * -log_s(h) + 0.25 * b + 0.5 * n for h, b, n in zip((0.7, -0.5), bco, (2.5, 1.5), strict=True)]
    assert row_losses(golden(), mixed(MIX, {})).tolist() == pytest.approx(expected, rel=1e-12)
    weighed = row_losses(golden(), mixed(MIX, {"wpo": True}))
    assert weighed.tolist() == pytest.approx([expected[0] / 2, expected[1] / 4], rel=1e-12)


def test_the_numbers_of_a_mix():
    spec = mixed({"nca_pair": 0.5, "sigmoid": 0.5, "exo_pair": 2.0}, {"label_smoothing": 0.2, "ld_alpha": 0.5})
    assert [(part.name, part.weight, part.beta) for part in spec.parts] == [
        ("exo_pair", 2.0, 0.1),
        ("sigmoid", 0.5, 0.1),
        ("nca_pair", 0.5, 0.01),
    ]
    assert [part.label_smoothing for part in spec.parts] == [0.2, 0.2, 0.0]
    assert all(part.ld_alpha == 0.5 for part in spec.parts)
    assert LossSpec.model_validate_json(spec.model_dump_json()) == spec


def test_gradient_of_a_mix():
    columns = [torch.randn(4, dtype=torch.float64, requires_grad=n < 2) for n in range(4)]
    spec = mixed(MIX, {"beta": 0.7})
    loss = lambda w, x: row_losses(replace(inputs(w, x, *columns[2:]), baseline=0.3), spec)  # noqa: E731
    assert torch.autograd.gradcheck(loss, columns[:2])


def test_pair_weights():
    """Answers of 2 and 4 tokens: exp(-1/2 - 2/4); where both together are above 1, 1."""
    aligned_S, tokens_S = torch.tensor([-1.0, 3.0, -2.0, -1.0], requires_grad=True), torch.tensor([2, 1, 4, 1])
    weight_P = pair_weights(aligned_S, tokens_S)
    assert weight_P.tolist() == pytest.approx([math.exp(-1), 1.0])
    assert not weight_P.requires_grad


def test_a_job_with_ld_alpha_says_the_rewards_it_trains_on():
    chosen_P, rejected_P = rewards(golden(), LossSpec(name="sigmoid", beta=1.0, ld_alpha=0.0))
    assert (chosen_P.tolist(), rejected_P.tolist()) == ([2.0, 1.0], [-3.0, 5.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIRED)
def test_extreme_log_probabilities_stay_finite(name, dtype):
    far = torch.tensor([0.0, -1e-9, -1e-3, -1e4, -1e3, -100.0, 0.0], dtype=dtype, requires_grad=True)
    near = torch.tensor([0.0, 0.0, -1e4, -1e-3, 0.0, 0.0, -100.0], dtype=dtype, requires_grad=True)
    zero = torch.zeros(7, dtype=dtype)
    scale = {} if name == "orpo" else {"beta": 1.0}
    loss_P = row_losses(inputs(far, near, zero, zero), LossSpec(name=name, **scale))
    loss_P.sum().backward()
    for value in (loss_P, far.grad, near.grad):
        assert torch.isfinite(value).all()


def test_discopop_vanishes_far_below_where_the_plain_formula_is_nan():
    x = torch.tensor([-100.0])
    naive = -(1 - torch.sigmoid(x / 0.05)) * torch.nn.functional.logsigmoid(x) + torch.sigmoid(x / 0.05) * torch.exp(-x)
    assert torch.isnan(naive)
    assert row_losses(inputs(x, x * 0, x * 0, x * 0), LossSpec(name="discopop", beta=1.0)).item() == pytest.approx(100)


def test_log1mexp_is_precise_at_both_ends():
    x = [-1e-6, -1e-3, -0.5, -math.log(2), -1.0, -20.0, -80.0]
    expected = [math.log(-math.expm1(value)) if value > -1 else math.log1p(-math.exp(value)) for value in x]
    assert log1mexp(torch.tensor(x)).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-37)


GRADIENTS = [(name, {}) for name in PAIRED] + [
    ("sigmoid", {"beta": 0.3, "label_smoothing": 0.1, "length_penalty": 0.2, "rpo_alpha": 0.7}),
    ("hinge", {"length_penalty": 0.2}),
    ("ipo", {"length_normalize": False}),
    ("exo_pair", {"beta": 1.0, "label_smoothing": 0.2}),
    ("nca_pair", {"beta": 1.0}),
    ("discopop", {"beta": 1.0, "discopop_tau": 0.5}),
    ("sppo", {"beta": 0.5}),
    ("simpo", {"rpo_alpha": 1.0}),
    ("sigmoid", {"ld_alpha": 0.3, "wpo": True, "rpo_alpha": 0.5}),
]


@pytest.mark.parametrize(("name", "numbers"), GRADIENTS)
def test_gradient(name, numbers):
    spec, generator = LossSpec(name=name, **numbers), torch.Generator().manual_seed(0)
    columns = [
        (-5 - torch.rand(6, dtype=torch.float64, generator=generator) * 9).requires_grad_(n < 2) for n in range(4)
    ]
    tokens = {"n_chosen": [1, 2, 3, 4, 5, 9], "n_rejected": [4, 2, 8, 1, 3, 5]}

    def loss(chosen_P, rejected_P):
        made = inputs(chosen_P, rejected_P, *columns[2:], **tokens)
        tails = {"chosen_tail_P": chosen_P / 3, "rejected_tail_P": rejected_P / 4}
        return row_losses(replace(made, **tails, weight_P=torch.linspace(0, 1, 6, dtype=torch.float64)), spec)

    assert torch.autograd.gradcheck(loss, columns[:2])


def unpaired(chosen_P, *, reference=0.0, labels=(1.0, 0.0), baseline=0.0):
    reference_P = torch.full_like(chosen_P, reference)
    labels_P = torch.tensor(labels, dtype=chosen_P.dtype)
    return LossInputs(chosen_P, torch.ones(2), ref_chosen_P=reference_P, label_P=labels_P, baseline=baseline)


def test_gradient_of_kto():
    chosen = torch.randn(2, dtype=torch.float64, requires_grad=True)
    spec = LossSpec(name="kto", beta=0.7, desirable_weight=1.3)
    assert torch.autograd.gradcheck(lambda c: row_losses(unpaired(c, baseline=0.4), spec), [chosen])


def test_kto_is_one_half_at_the_reference_and_pulls_labels_apart():
    chosen = torch.zeros(2, requires_grad=True)
    loss_P = row_losses(unpaired(chosen), LossSpec(name="kto"))
    assert loss_P.tolist() == [0.5, 0.5]
    up, down = torch.autograd.grad(loss_P.sum(), chosen)[0].tolist()
    assert up < 0 < down
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss_P = row_losses(unpaired(far), LossSpec(name="kto"))
    assert loss_P.tolist() == [1.0, 1.0]
    assert torch.isfinite(torch.autograd.grad(loss_P.sum(), far)[0]).all()


def test_gradient_of_sft():
    chosen = torch.randn(4, dtype=torch.float64, requires_grad=True)
    tokens = torch.ones(4)
    assert torch.autograd.gradcheck(lambda c: row_losses(LossInputs(c, tokens), LossSpec(name="sft")), [chosen])


def test_rewards_are_measured_against_the_reference_where_there_is_one():
    def of(name, **numbers):
        return [column.tolist() for column in rewards(golden(), LossSpec(name=name, **numbers))]

    assert of("sigmoid", beta=0.5) == of("ipo", beta=0.5) == [[1.0, 0.0], [-2.5, 2.5]]
    assert of("simpo", beta=2.0) == [[-5.0, -3.0], [-8.0, -1.0]]
    assert of("orpo", lam=0.5) == [[-1.25, -0.75], [-2.0, -0.25]]


@pytest.mark.parametrize("name", PAIRED)
def test_loss_without_its_inputs_is_refused(name):
    with pytest.raises(AssertionError, match="pairs"):
        row_losses(LossInputs(torch.zeros(1), torch.ones(1)), LossSpec(name=name))
    zero, tokens = torch.zeros(1) - 1, torch.ones(1)
    without = LossInputs(zero, tokens, zero, tokens)
    if LOSS_TABLE[name].reference:
        with pytest.raises(AssertionError, match="reference"):
            row_losses(without, LossSpec(name=name))
    else:
        assert torch.isfinite(row_losses(without, LossSpec(name=name))).all()
