"""The losses: one pure function each, from log-probabilities to one value a row.

Shapes: P rows (pairs; answers for `sft`). For a pair, `D` is policy minus reference log-probability of an answer.

A function returns the loss of each row, not a mean: the step divides the sum by what the WHOLE step holds over all
micro-batches and ranks (`DIVISOR`), so k accumulation steps equal one batch and n ranks equal one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_service.specs.method import LossSpec


@dataclass(frozen=True)
class LossInputs:
    """Summed log-probabilities, float32 or float64, and token counts of the answers."""

    chosen_P: Tensor
    chosen_tokens_P: Tensor
    rejected_P: Tensor | None = None
    rejected_tokens_P: Tensor | None = None
    ref_chosen_P: Tensor | None = None
    ref_rejected_P: Tensor | None = None

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """`D` of the chosen and of the rejected answer."""
        assert self.rejected_P is not None, "this loss needs pairs"
        assert self.ref_chosen_P is not None, "this loss needs a reference"
        assert self.ref_rejected_P is not None, "this loss needs a reference"
        return self.chosen_P - self.ref_chosen_P, self.rejected_P - self.ref_rejected_P


Loss = Callable[[LossInputs, LossSpec], Tensor]


def sigmoid(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """DPO, arXiv:2305.18290 eq. 7: -log sigmoid(beta h), h = D_chosen - D_rejected.

    With `label_smoothing` e it is conservative DPO: -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h).
    """
    chosen_P, rejected_P = inputs.log_ratios()
    margin_P = spec.beta * (chosen_P - rejected_P)
    smoothing = spec.label_smoothing
    return -(1 - smoothing) * logsigmoid(margin_P) - smoothing * logsigmoid(-margin_P)


def sft(inputs: LossInputs, spec: LossSpec) -> Tensor:
    """Negative log-likelihood of the answer, summed over its tokens; the step averages over all its answer tokens."""
    return -inputs.chosen_P


LOSSES: dict[str, Loss] = {"sigmoid": sigmoid, "sft": sft}

DIVISOR: dict[str, Literal["rows", "tokens"]] = {"sigmoid": "rows", "sft": "tokens"}
"""What the step divides the summed loss by: its rows, or the tokens of its (chosen) answers."""
