"""What a step and an evaluation say, under TRL's names.

Everything is kept as sums that add over micro-batches, ranks and steps, and divided once at the end; so a mean over
two ranks is the mean over all rows, whatever share each rank had.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dpo_service.specs.loss import LossSpec
from dpo_service.train.batch import MicroBatch
from dpo_service.train.logprobs import Completions
from dpo_service.train.losses import DIVISOR, LossInputs, rewards
from dpo_service.train.ranks import Ranks

_COMMON = ("loss", "rows", "answer_tokens", "tokens", "truncated")
_PAIRED = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")
_ANSWERS = ("correct",)


def empty(paired: bool) -> dict[str, float]:
    return dict.fromkeys((*_COMMON, *(_PAIRED if paired else _ANSWERS)), 0.0)


def add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        total[name] += value


def reduce(sums: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """The same sums over all ranks; every rank must hold the same names in the same order."""
    return dict(zip(sums, ranks.sum(list(sums.values())), strict=True))


def of_batch(
    batch: MicroBatch, completions: Completions, inputs: LossInputs, loss_P: Tensor, spec: LossSpec
) -> dict[str, float]:
    """The sums of one micro-batch on one rank."""
    sums = {
        "loss": float(loss_P.detach().sum()),
        "rows": float(batch.rows),
        "answer_tokens": float(inputs.chosen_tokens_P.sum()),
        "tokens": float(batch.tokens),
        "truncated": float(batch.truncated),
    }
    if not batch.paired:
        return {**sums, "correct": float(completions.correct_S.sum())}
    return {**sums, **_of_pairs(inputs, spec)}


def _of_pairs(inputs: LossInputs, spec: LossSpec) -> dict[str, float]:
    """Accuracy: margin of the implicit rewards > 0; an exact tie, as before the first step, counts one half (TRL counts
    it 0), so that an untrained policy scores one half and not nothing."""
    chosen_P, rejected_P = rewards(inputs, spec)
    wins_P = (chosen_P > rejected_P).float() + 0.5 * (chosen_P == rejected_P).float()
    assert inputs.rejected_P is not None
    return {
        "rewards/chosen": float(chosen_P.sum()),
        "rewards/rejected": float(rejected_P.sum()),
        "rewards/accuracies": float(wins_P.sum()),
        "logps/chosen": float(inputs.chosen_P.detach().sum()),
        "logps/rejected": float(inputs.rejected_P.detach().sum()),
    }


def means(sums: Mapping[str, float], loss: str) -> dict[str, float]:
    """Metrics by name, from sums over at least one row. Rewards and log-probabilities are means over pairs, in nats."""
    rows = sums["rows"]
    divisor = rows if DIVISOR[loss] == "rows" else sums["answer_tokens"]
    result = {"loss": sums["loss"] / divisor, "truncated_share": sums["truncated"] / rows}
    if "correct" in sums:
        return {**result, "mean_token_accuracy": sums["correct"] / sums["answer_tokens"]}
    result |= {name: sums[name] / rows for name in _PAIRED}
    result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
    return result


def rates(sums: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Throughput over all ranks."""
    rows = "answers_per_second" if "correct" in sums else "pairs_per_second"
    seconds = max(seconds, 1e-9)
    return {rows: sums["rows"] / seconds, "tokens_per_second": sums["tokens"] / seconds}


def sentence(step: int, total: int, split: str, values: Mapping[str, float]) -> str:
    """One line for a person: `Step 5/20: training loss=0.61, reward accuracy=0.75`."""
    text = f"Step {step}/{total}: {split} loss={values['loss']:.4f}"
    if "rewards/accuracies" in values:
        text += f", reward accuracy={values['rewards/accuracies']:.2f}, margin={values['rewards/margins']:.3f}"
    if "mean_token_accuracy" in values:
        text += f", token accuracy={values['mean_token_accuracy']:.2f}"
    return text
