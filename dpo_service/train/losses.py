"""The losses: one pure function each, from log-probabilities to one value a row.

Shapes: P rows (pairs; answers for `sft`). For a pair, w is the chosen and l the rejected answer, `lp` the summed
log-probability of an answer's n tokens, `D` = lp - its reference, h = D_w - D_l. With `ld_alpha`, the lp in D counts
tokens past the shorter answer's length in that part only (LD-DPO, arXiv:2409.06411); so does its reference.

A function returns the loss of each row, not a mean: the step divides the sum by what the WHOLE step holds over all
micro-batches and ranks (`DIVISOR`), so k accumulation steps equal one batch and n ranks equal one. Which numbers of
`LossSpec` a loss reads, and their defaults, is in specs/loss.py; all formulas stay finite at any finite input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_service.specs.loss import LOSS_TABLE, LossName, LossSpec

LARGEST_MEAN_LOGP = -1e-6
"""Nearer to 0 the odds of an answer, p / (1 - p), have no float32 value, and their gradient is NaN."""


@dataclass(frozen=True)
class LossInputs:
    """Summed log-probabilities, float32 or float64, and token counts of the answers.

    A job with `ld_alpha` needs the tails, and a reference that has left out the same part of them.
    """

    chosen_P: Tensor
    chosen_tokens_P: Tensor
    rejected_P: Tensor | None = None
    rejected_tokens_P: Tensor | None = None
    ref_chosen_P: Tensor | None = None
    ref_rejected_P: Tensor | None = None
    chosen_tail_P: Tensor | None = None
    """The part of `chosen_P` past the length of the pair's shorter answer."""
    rejected_tail_P: Tensor | None = None
    weight_P: Tensor | None = None
    """WPO's weight of each pair, without gradient (`pair_weights`)."""
    label_P: Tensor | None = None
    """Of unpaired answers, which are `chosen_P`: 1 = desirable, 0 = undesirable. Of pairs: the judged probability that
    the chosen answer wins; None = 1."""
    baseline: Tensor | float = 0.0
    """What D is compared with, in nats. `kto`: z, the mean over answers that do not belong to their prompts;
    `bco_pair`: the mean of D over both answers of all earlier steps."""

    def log_ratios(self, ld_alpha: float = 1.0) -> tuple[Tensor, Tensor]:
        """`D` of the chosen and of the rejected answer."""
        assert self.rejected_P is not None, "this loss needs pairs"
        assert self.ref_chosen_P is not None, "this loss needs a reference"
        assert self.ref_rejected_P is not None, "this loss needs a reference"
        chosen_P = without_tail(self.chosen_P, self.chosen_tail_P, ld_alpha)
        rejected_P = without_tail(self.rejected_P, self.rejected_tail_P, ld_alpha)
        return chosen_P - self.ref_chosen_P, rejected_P - self.ref_rejected_P

    def mean_log_ratios(self) -> tuple[Tensor, Tensor]:
        """`D / n`: the mean over the answer's tokens."""
        chosen_P, rejected_P = self.log_ratios()
        return chosen_P / self.chosen_tokens_P, rejected_P / self._rejected_tokens()

    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """`lp / n`, without a reference."""
        assert self.rejected_P is not None, "this loss needs pairs"
        return self.chosen_P / self.chosen_tokens_P, self.rejected_P / self._rejected_tokens()

    def extra_tokens(self) -> Tensor:
        """`n_w - n_l`, in the precision of the log-probabilities."""
        return (self.chosen_tokens_P - self._rejected_tokens()).to(self.chosen_P.dtype)

    def _rejected_tokens(self) -> Tensor:
        assert self.rejected_tokens_P is not None, "this loss needs pairs"
        return self.rejected_tokens_P


Loss = Callable[[LossInputs, LossSpec], Tensor]


def without_tail(logps: Tensor, tail: Tensor | None, ld_alpha: float) -> Tensor:
    """`logps` with its `tail` counted `ld_alpha` times; 1 = whole, and the tail may be unknown."""
    if ld_alpha == 1:
        return logps
    assert tail is not None, "ld_alpha needs the tails"
    return logps - (1 - ld_alpha) * tail


def pair_weights(aligned_S: Tensor, tokens_S: Tensor) -> Tensor:
    """WPO, arXiv:2406.11827 eq. 2 with its sampled alignment, [P] from [S]: min(1, v_w v_l), without gradient.

    v = exp of the mean over an answer's tokens of log p(token) - log sum_v p(v)^2: 1 for an answer as likely as those
    the policy itself samples. The limit of 1 is of the authors' code; TRL has none.
    """
    chosen_P, rejected_P = (aligned_S.detach() / tokens_S).chunk(2)
    return torch.exp(chosen_P + rejected_P).clamp(max=1)


def _margin(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """beta h, and with `length_penalty` a: beta h + a (n_w - n_l), R-DPO (arXiv:2403.19159).

    Plus: the policy that is best for the penalised reward r - a n has r = beta D + a n + const. So a pair whose chosen
    answer is the longer one counts as won by its length in part, and pushes less.
    """
    chosen_P, rejected_P = inputs.log_ratios(spec.ld_alpha)
    margin_P = spec.beta * (chosen_P - rejected_P)
    return margin_P + spec.length_penalty * inputs.extra_tokens() if spec.length_penalty else margin_P


def _rewards(inputs: LossInputs, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """beta D of both answers."""
    chosen_P, rejected_P = inputs.log_ratios(spec.ld_alpha)
    return spec.beta * chosen_P, spec.beta * rejected_P


def sigmoid(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """DPO, arXiv:2305.18290 eq. 7: -log sigmoid(beta h).

    With `label_smoothing` e it is conservative DPO: -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h).
    """
    margin_P, smoothing = _margin(inputs, spec), spec.label_smoothing
    return -(1 - smoothing) * logsigmoid(margin_P) - smoothing * logsigmoid(-margin_P)


def robust(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """Robust DPO, arXiv:2403.00409: [-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1-2e).

    The mean over labels flipped with probability e is the loss under the true labels; so it can be negative.
    """
    margin_P, smoothing = _margin(inputs, spec), spec.label_smoothing
    return (-(1 - smoothing) * logsigmoid(margin_P) + smoothing * logsigmoid(-margin_P)) / (1 - 2 * smoothing)


def hinge(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """SLiC-HF, arXiv:2305.10425, with DPO's rewards (arXiv:2309.06657): max(0, 1 - beta h)."""
    return torch.relu(1 - _margin(inputs, spec))


def ipo(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """IPO, arXiv:2310.12036 eq. 17: (h - 1 / (2 beta))^2.

    With `length_normalize`, h is D_w/n_w - D_l/n_l, as the authors advise; without, the sum form.
    """
    chosen_P, rejected_P = inputs.mean_log_ratios() if spec.length_normalize else inputs.log_ratios()
    return (chosen_P - rejected_P - 1 / (2 * spec.beta)) ** 2


def sigmoid_norm(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """Length-normalised DPO, Tulu 3, arXiv:2411.15124: -log sigmoid(beta (D_w/n_w - D_l/n_l))."""
    chosen_P, rejected_P = inputs.mean_log_ratios()
    return -logsigmoid(spec.beta * (chosen_P - rejected_P))


def exo_pair(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """EXO on pairs, arXiv:2402.00856 eq. 16: KL(softmax(beta D_w, beta D_l) || (1-e, e)), e = `label_smoothing`."""
    margin_P, smoothing = _margin(inputs, spec), spec.label_smoothing
    log_w_P, log_l_P = logsigmoid(margin_P), logsigmoid(-margin_P)
    return log_w_P.exp() * (log_w_P - math.log1p(-smoothing)) + log_l_P.exp() * (log_l_P - math.log(smoothing))


def nca_pair(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """NCA on pairs, arXiv:2402.05369: -log s(beta D_w) - 1/2 log s(-beta D_w) - 1/2 log s(-beta D_l), s = sigmoid."""
    chosen_P, rejected_P = _rewards(inputs, spec)
    return -logsigmoid(chosen_P) - 0.5 * logsigmoid(-chosen_P) - 0.5 * logsigmoid(-rejected_P)


def bco_pair(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """BCO on pairs, arXiv:2404.04656 eq. 11: -log sigmoid(beta D_w - d) - log sigmoid(-(beta D_l - d)).

    d is the mean reward of both answers over the steps before this one, so all of a step's rows have the same; TRL's
    DPOTrainer has d = 0.
    """
    chosen_P, rejected_P = _rewards(inputs, spec)
    shift = spec.beta * inputs.baseline
    return -logsigmoid(chosen_P - shift) - logsigmoid(shift - rejected_P)


def apo_zero(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """APO-zero, arXiv:2408.06266 eq. 7: 1 - sigmoid(beta D_w) + sigmoid(beta D_l).

    For chosen answers better than what the model says: chosen goes up, rejected down.
    """
    chosen_P, rejected_P = _rewards(inputs, spec)
    return torch.sigmoid(-chosen_P) + torch.sigmoid(rejected_P)


def apo_down(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """APO-down, arXiv:2408.06266 eq. 8: sigmoid(beta D_w) + 1 - sigmoid(beta h).

    For chosen answers worse than what the model says: both go down, the rejected one further.
    """
    chosen_P, rejected_P = _rewards(inputs, spec)
    return torch.sigmoid(chosen_P) + torch.sigmoid(rejected_P - chosen_P)


def discopop(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """DiscoPOP (LRML), arXiv:2406.08414 eq. 5, x = beta h, m = sigmoid(x / tau): -(1-m) log sigmoid(x) + m exp(-x).

    Not monotonic: at tau = 0.05 it rises between x = -0.118 and 0.072, as its authors found it.
    m exp(-x) is exp(log m - x), or a far negative x gives 0 * infinity; it falls to 0 there because tau < 1.
    """
    x_P = _margin(inputs, spec)
    scaled_P = x_P / spec.discopop_tau
    return -torch.sigmoid(-scaled_P) * logsigmoid(x_P) + torch.exp(logsigmoid(scaled_P) - x_P)


def sppo(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """SPPO, arXiv:2405.00675 eq. 4.7, eta = 1/beta: 1/2 [(D_w - eta (P_w - 1/2))^2 + (D_l - eta (1/2 - P_w))^2].

    P_w, the probability that w beats the policy's average answer, is the dataset's `chosen_probability`; where it gives
    verdicts only, 1.
    """
    chosen_P, rejected_P = inputs.log_ratios(spec.ld_alpha)
    goal = (0.5 if inputs.label_P is None else inputs.label_P - 0.5) / spec.beta
    return 0.5 * ((chosen_P - goal) ** 2 + (rejected_P + goal) ** 2)


def orpo(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """ORPO, arXiv:2403.07691 eq. 6-7, a = lp/n: -a_w - lam log sigmoid(log_odds(a_w) - log_odds(a_l)).

    log_odds(a) = a - log(1 - exp a). The first term is the answer's negative log-likelihood per token; TRL takes
    it over the prompt too.
    """
    chosen_P, rejected_P = inputs.mean_logps()
    return -chosen_P - spec.lam * logsigmoid(_log_odds(chosen_P) - _log_odds(rejected_P))


def _log_odds(mean_logps_P: Tensor) -> Tensor:
    clamped_P = mean_logps_P.clamp(max=LARGEST_MEAN_LOGP)
    return clamped_P - log1mexp(clamped_P)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp x) for x < 0, to full precision at both ends (Mächler 2012)."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def simpo(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """SimPO, arXiv:2405.14734 eq. 6: -log sigmoid(beta (lp_w/n_w - lp_l/n_l) - gamma).

    gamma = `gamma_beta_ratio` * beta.
    """
    chosen_P, rejected_P = inputs.mean_logps()
    return -logsigmoid(spec.beta * (chosen_P - rejected_P - spec.gamma_beta_ratio))


def kto(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """KTO, arXiv:2402.01306 eq. 7: lam_d (1 - sigmoid(beta (D - z))), undesirable lam_u (1 - sigmoid(beta (z - D))).

    z = max(0, mean of D over mismatched answers of the whole step), a constant: `step.baseline_of`.
    """
    assert inputs.label_P is not None, "this loss needs labels"
    assert inputs.ref_chosen_P is not None, "this loss needs a reference"
    reward_P = spec.beta * (inputs.chosen_P - inputs.ref_chosen_P - inputs.baseline)
    desirable_P = spec.desirable_weight * torch.sigmoid(-reward_P)
    return torch.where(inputs.label_P > 0, desirable_P, spec.undesirable_weight * torch.sigmoid(reward_P))


def sft(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """Negative log-likelihood of the answer, summed over its tokens; the step averages over all its answer tokens."""
    return -inputs.chosen_P


LOSSES: dict[LossName, Loss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid_norm": sigmoid_norm,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sppo": sppo,
    "orpo": orpo,
    "simpo": simpo,
    "kto": kto,
    "sft": sft,
}

DIVISOR: dict[str, Literal["rows", "tokens"]] = {name: "tokens" if name == "sft" else "rows" for name in LOSSES}
"""What the step divides the summed loss by: its rows, or the tokens of its (chosen) answers."""


def row_losses(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """The loss of each row, [P], or the weighted sum of several, with the terms any paired loss can carry.

    `rpo_alpha` adds its multiple of the chosen answer's negative log-likelihood per token (RPO, arXiv:2404.19733).
    `wpo` multiplies the whole by the pair's weight.
    """
    loss_P = torch.stack([part.weight * LOSSES[part.name](inputs, part) for part in spec.parts]).sum(0)
    if spec.rpo_alpha:
        loss_P = loss_P - spec.rpo_alpha * inputs.mean_logps()[0]
    if spec.wpo:
        assert inputs.weight_P is not None, "wpo needs the pairs' weights"
        loss_P = loss_P * inputs.weight_P
    return loss_P


def rewards(inputs: LossInputs, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """The implicit rewards of the chosen and the rejected answers, [P] each, detached.

    beta D; without a reference beta (ORPO: lam) times the mean log-probability, as TRL has it.
    """
    if LOSS_TABLE[spec.name].reference:
        chosen_P, rejected_P = _rewards(inputs, spec)
    else:
        scale = spec.lam if spec.name == "orpo" else spec.beta
        chosen_P, rejected_P = (scale * mean_P for mean_P in inputs.mean_logps())
    return chosen_P.detach(), rejected_P.detach()
