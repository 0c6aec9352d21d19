"""One training step: micro-batches in, weights moved, sums out.

    KTO only: each micro-batch's mismatched answers, forward without gradient -> mean over ranks -> z
    for each micro-batch of this rank:  forward -> loss / (rows of the WHOLE step) -> backward
    sums and gradients summed over ranks -> clip -> loss and norm finite? -> AdamW

Nothing in it waits for the device, where the optimizer can skip a step on it (`guard`).

Shapes: P pairs, S sequences (2P, chosen first).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpo_service.specs.run import RunSpec
from dpo_service.train import metrics
from dpo_service.train.batch import MicroBatch
from dpo_service.train.flops import Cost
from dpo_service.train.guard import Guard
from dpo_service.train.logprobs import Completions, completion_logps, packed
from dpo_service.train.losses import DIVISOR, LossInputs, pair_weights, row_losses
from dpo_service.train.moving import MovingReference
from dpo_service.train.optim import clip_gradients, learning_rate, trained_parameters
from dpo_service.train.policy import adapter_dropout, autocast, base_of
from dpo_service.train.ranks import Ranks
from dpo_service.train.reference import Reference, ReferenceLogps


@dataclass
class TrainState:
    """What a step works on and moves."""

    run: RunSpec
    policy: Any
    """The model, or the peft model around it; weights float32."""
    reference: Reference
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    total_steps: int
    drift: Tensor = field(init=False)
    """`bco_pair`: the sum of D over both answers of all pairs so far, and how many answers; float64, part of a
    checkpoint."""
    guard: Guard = field(init=False)
    cost: Cost = field(init=False)
    forward_cost: Cost = field(init=False)

    def __post_init__(self) -> None:
        self.drift = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        self.cost = Cost.of(self.policy)
        self.forward_cost = Cost.of(self.policy, backward=False)
        self.guard = Guard(self.optimizer, self.ranks.device)

    @property
    def moving(self) -> MovingReference | None:
        return self.reference if isinstance(self.reference, MovingReference) else None


@dataclass(frozen=True)
class StepResult:
    sums: metrics.Sums
    """over all ranks"""
    grad_norm: Tensor
    """before clipping; a scalar on the device"""
    learning_rate: float


def train_step(state: TrainState, step: int, batches: Sequence[MicroBatch], divisor: float) -> StepResult:
    """Step number `step`, from 0, on this rank's `batches` (may be none); `divisor` is that of the step over all ranks.

    Raises:
        NonFiniteLoss: on every rank, before any weight moved; or at the next `guard.check()` (see there).
    """
    sums = metrics.empty(state.run.trained_rows, state.ranks.device)
    baseline = baseline_of(state, batches)
    with adapter_dropout(state.policy, _seed(state.run.seed, step, state.ranks.rank)):
        for batch in batches:
            values = _accumulate(state, batch.to(state.ranks.device), divisor, baseline)
            if not batch.blank:
                sums.add(values)
    state.ranks.sum_tensor(sums.values_N)
    if state.run.loss.has("bco_pair"):
        _add_drift(state, sums)
    parameters = list(trained_parameters(state.policy).values())
    state.ranks.sum_gradients(parameters)
    norm = clip_gradients(parameters, state.run.optim.max_grad_norm)
    state.guard.watch(step + 1, sums["loss"], norm)
    rate = learning_rate(state.run.optim, step, state.total_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return StepResult(sums, norm, rate)


@torch.no_grad()
def evaluate_batch(state: TrainState, batch: MicroBatch, baseline: Tensor | float) -> dict[str, Tensor | float]:
    """The sums of one micro-batch of the validation split on this rank; `baseline` is that of the whole split."""
    return _forward(state, batch.to(state.ranks.device), baseline)[1]


@torch.no_grad()
def baseline_of(state: TrainState, batches: Iterable[MicroBatch]) -> Tensor | float:
    """`LossInputs.baseline`, the same on every rank. KTO: max(0, mean of D over the mismatched answers of all ranks'
    `batches`), so it does not depend on how a step is cut. BCO: the mean of D so far."""
    if state.run.trained_rows != "unpaired":
        return (state.drift[0] / state.drift[1].clamp(min=1)).float() if state.run.loss.has("bco_pair") else 0.0
    total_and_rows = torch.zeros(2, dtype=torch.float64, device=state.ranks.device)
    for batch in batches:
        assert batch.mismatched is not None
        mismatched = batch.mismatched.to(state.ranks.device)
        with autocast(state.ranks.device, state.run.precision):
            logps_P = completion_logps(base_of(state.policy), mismatched).logps_S
        reference = state.reference(mismatched)
        assert reference is not None
        if not batch.blank:
            total_and_rows[0] += (logps_P - reference[0]).sum()
            total_and_rows[1] += mismatched.rows
    state.ranks.sum_tensor(total_and_rows)
    mean: Tensor = total_and_rows[0] / total_and_rows[1]
    return mean.clamp(min=0).float()


def _add_drift(state: TrainState, sums: metrics.Sums) -> None:
    """The step's D, of all ranks, to the mean of the next steps."""
    state.drift[0] += (sums["rewards/chosen"] + sums["rewards/rejected"]) / state.run.loss.beta
    state.drift[1] += 2 * sums["rows"]


def _accumulate(
    state: TrainState, batch: MicroBatch, divisor: float, baseline: Tensor | float
) -> dict[str, Tensor | float]:
    loss_P, sums = _forward(state, batch, baseline)
    ((loss_P.sum() * 0.0 if batch.blank else loss_P.sum()) / divisor).backward()  # type: ignore[no-untyped-call]
    return sums


def _forward(
    state: TrainState, batch: MicroBatch, baseline: Tensor | float
) -> tuple[Tensor, dict[str, Tensor | float]]:
    model, router = base_of(state.policy), state.run.router_aux_loss_coef
    with autocast(state.ranks.device, state.run.precision):
        completions = completion_logps(model, batch, aligned=state.run.loss.wpo, routed=router > 0)
    inputs = loss_inputs(batch, completions, state.reference(batch), baseline)
    loss_P = row_losses(inputs, state.run.loss)
    if completions.router_loss is not None:
        by_rows = DIVISOR[state.run.loss.name] == "rows"
        loss_P = loss_P + router * completions.router_loss * (1.0 if by_rows else inputs.chosen_tokens_P)
    flops = state.cost.of_pairs(batch.segments)
    if batch.mismatched is not None:
        flops += state.forward_cost.of_pairs(batch.mismatched.segments)
    work = metrics.of_work(batch, packed=packed(model, batch), flops=flops)
    return loss_P, metrics.of_batch(batch, completions, inputs, loss_P, state.run.loss) | work


def loss_inputs(
    batch: MicroBatch, completions: Completions, reference: ReferenceLogps | None, baseline: Tensor | float = 0.0
) -> LossInputs:
    logps_S, tail_S, tokens_S, rows = completions.logps_S, completions.tail_S, batch.lengths_S, batch.rows
    return LossInputs(
        chosen_P=logps_S[:rows],
        chosen_tokens_P=tokens_S[:rows],
        rejected_P=logps_S[rows:] if batch.paired else None,
        rejected_tokens_P=tokens_S[rows:] if batch.paired else None,
        ref_chosen_P=reference[0] if reference else None,
        ref_rejected_P=reference[1] if reference else None,
        chosen_tail_P=tail_S[:rows],
        rejected_tail_P=tail_S[rows:] if batch.paired else None,
        weight_P=None if completions.aligned_S is None else pair_weights(completions.aligned_S, tokens_S),
        label_P=batch.label_P,
        baseline=baseline,
    )


def _seed(seed: int, step: int, rank: int) -> int:
    """Randomness is a function of where we are, so a resumed run needs no generator state."""
    return (seed * 1_000_003 + step * 8_191 + rank) % 2**63
