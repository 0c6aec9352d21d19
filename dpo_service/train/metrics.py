"""What a step and an evaluation say, under TRL's names.

Everything is kept as sums that add over micro-batches, ranks and steps, and divided once at the end; so a mean over
two ranks is the mean over all rows, whatever share each rank had. The sums stay on the device, in one tensor, until
somebody is told them: adding to them waits for nothing.

Shapes: P pairs or answers, N sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpo_service.specs.loss import LOSS_TABLE, LossName, LossSpec
from dpo_service.specs.method import RowKind
from dpo_service.train.batch import MicroBatch
from dpo_service.train.logprobs import Completions
from dpo_service.train.losses import DIVISOR, LossInputs, rewards

_COMMON = ("loss", "rows", "answer_tokens", "tokens", "truncated", "places", "padding", "flops", "router_loss")
_PAIRED = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")
_LENGTHS = ("displaced", "gap", "gap_gap", "margin_margin", "gap_margin")
_SAMPLED = ("sampler_gap", "sampled_tokens")
_SIDES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
_OF_KIND: dict[RowKind, tuple[str, ...]] = {
    "pairs": (*_PAIRED, *_LENGTHS, *_SAMPLED),
    "answers": ("correct",),
    "unpaired": (*_SIDES, "desirable", "kl"),
}
_NOISE = 1e-12
"""A spread below this share of its parts is what float64 leaves of one that is zero."""

ROUNDING = 1e-4
"""An answer is displaced when its log-probability fell by more than this share of it: what is below is rounding."""


class Sums:
    """Sums by name, float64 on `device`."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self.values_N = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Those of one micro-batch: scalars on the device, or numbers the host knows. Every name, in any order."""
        assert values.keys() == set(self.names), values.keys() ^ set(self.names)
        self.values_N += torch.stack([self._scalar(values[name]) for name in self.names])

    def merge(self, other: Sums) -> None:
        assert other.names == self.names
        self.values_N += other.values_N

    def __getitem__(self, name: str) -> Tensor:
        """A scalar on the device."""
        return self.values_N[self.names.index(name)]

    def read(self) -> dict[str, float]:
        """Waits for the device."""
        return dict(zip(self.names, self.values_N.tolist(), strict=True))

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self.values_N.device)


def empty(rows: RowKind, device: torch.device) -> Sums:
    return Sums((*_COMMON, *_OF_KIND[rows]), device)


@torch.no_grad()
def of_batch(
    batch: MicroBatch, completions: Completions, inputs: LossInputs, loss_P: Tensor, spec: LossSpec
) -> dict[str, Tensor | float]:
    """The sums of one micro-batch on one rank."""
    sums: dict[str, Tensor | float] = {
        "loss": loss_P.sum(),
        "rows": batch.rows,
        "answer_tokens": inputs.chosen_tokens_P.sum(),
        "tokens": batch.tokens,
        "truncated": batch.truncated,
        "router_loss": 0.0 if completions.router_loss is None else completions.router_loss * batch.rows,
    }
    if inputs.label_P is not None and not batch.paired:
        return {**sums, **_of_unpaired(inputs, inputs.label_P, spec)}
    if not batch.paired:
        return {**sums, "correct": completions.correct_S.sum()}
    return {**sums, **_of_pairs(inputs, spec), **_of_sampler(batch, completions)}


def _of_sampler(batch: MicroBatch, completions: Completions) -> dict[str, Tensor | float]:
    """How far the trainer's log-probabilities are from the sampler's, over the answers that were sampled."""
    if batch.sampled_S is None:
        return dict.fromkeys(_SAMPLED, 0.0)
    known_S = ~batch.sampled_S.isnan()
    gap_S = (completions.logps_S - batch.sampled_S).abs()
    return {
        "sampler_gap": torch.where(known_S, gap_S, 0.0).sum(),
        "sampled_tokens": torch.where(known_S, batch.lengths_S, 0).sum(),
    }


def of_work(batch: MicroBatch, *, packed: bool, flops: float) -> dict[str, Tensor | float]:
    """What computing it took: places of the input, those of them that hold no token, useful operations."""
    places = batch.places if packed else batch.padded_places
    return {"places": places, "padding": 0 if packed else places - batch.tokens, "flops": flops}


def _of_pairs(inputs: LossInputs, spec: LossSpec) -> dict[str, Tensor | float]:
    """Accuracy: margin of the implicit rewards > 0; an exact tie, as before the first step, counts one half (TRL counts
    it 0), so that an untrained policy scores one half and not nothing."""
    chosen_P, rejected_P = rewards(inputs, spec)
    wins_P = (chosen_P > rejected_P).float() + 0.5 * (chosen_P == rejected_P).float()
    assert inputs.rejected_P is not None
    return {
        "rewards/chosen": chosen_P.sum(),
        "rewards/rejected": rejected_P.sum(),
        "rewards/accuracies": wins_P.sum(),
        "logps/chosen": inputs.chosen_P.sum(),
        "logps/rejected": inputs.rejected_P.sum(),
        **_of_lengths(inputs, (chosen_P - rejected_P).double()),
    }


def _of_lengths(inputs: LossInputs, margin_P: Tensor) -> dict[str, Tensor | float]:
    """What tells whether chosen answers are unlearnt, and whether the margin is one of lengths."""
    displaced: Tensor | float = 0.0
    if inputs.ref_chosen_P is not None:
        displaced = (inputs.ref_chosen_P - inputs.chosen_P > ROUNDING * inputs.ref_chosen_P.abs()).sum()
    gap_P = inputs.extra_tokens().double()
    return {
        "displaced": displaced,
        "gap": gap_P.sum(),
        "gap_gap": gap_P.square().sum(),
        "margin_margin": margin_P.square().sum(),
        "gap_margin": (gap_P * margin_P).sum(),
    }


def _of_unpaired(inputs: LossInputs, label_P: Tensor, spec: LossSpec) -> dict[str, Tensor | float]:
    """`chosen` are the desirable answers, `rejected` the undesirable ones, as TRL has it."""
    assert inputs.ref_chosen_P is not None
    logps_P, other_P = inputs.chosen_P, 1 - label_P
    reward_P = spec.beta * (logps_P - inputs.ref_chosen_P)
    return {
        "rewards/chosen": (reward_P * label_P).sum(),
        "rewards/rejected": (reward_P * other_P).sum(),
        "logps/chosen": (logps_P * label_P).sum(),
        "logps/rejected": (logps_P * other_P).sum(),
        "desirable": label_P.sum(),
        "kl": inputs.baseline * len(label_P),
    }


def means(sums: Mapping[str, float], loss: LossName) -> dict[str, float]:
    """Metrics by name, from sums over at least one row; docs/metrics.md says what each is."""
    rows = sums["rows"]
    divisor = rows if DIVISOR[loss] == "rows" else sums["answer_tokens"]
    result = {
        "loss": sums["loss"] / divisor,
        "truncated_share": sums["truncated"] / rows,
        "padding_share": sums["padding"] / sums["places"],
    }
    if sums["router_loss"]:
        result["router_loss"] = sums["router_loss"] / rows
    if "correct" in sums:
        return {**result, "mean_token_accuracy": sums["correct"] / sums["answer_tokens"]}
    if "desirable" in sums:
        return result | _unpaired_means(sums)
    result |= {name: sums[name] / rows for name in _PAIRED}
    result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
    result["length/gap"] = sums["gap"] / rows
    if (correlation := length_correlation(sums)) is not None:
        result["length/margin_correlation"] = correlation
    if sums["sampled_tokens"]:
        result["online/logp_gap"] = sums["sampler_gap"] / sums["sampled_tokens"]
    if LOSS_TABLE[loss].reference:
        result["logps/displaced_share"] = sums["displaced"] / rows
    return result


def length_correlation(sums: Mapping[str, float]) -> float | None:
    """Pearson's correlation of n_w - n_l and the reward margin over pairs; None where one of them does not vary.

    From sums x, y, xx, yy, xy, so that it is that of all pairs, whatever micro-batch and rank they were in.
    """
    rows, gap, margin = sums["rows"], sums["gap"], sums["rewards/chosen"] - sums["rewards/rejected"]
    spreads = rows * sums["gap_gap"] - gap**2, rows * sums["margin_margin"] - margin**2
    if spreads[0] <= _NOISE * rows * sums["gap_gap"] or spreads[1] <= _NOISE * rows * sums["margin_margin"]:
        return None
    together = rows * sums["gap_margin"] - gap * margin
    return max(-1.0, min(1.0, together / math.sqrt(spreads[0] * spreads[1])))


def _unpaired_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over the desirable and over the undesirable answers, where there were any; `kl` is z, in nats."""
    counts = {"chosen": sums["desirable"], "rejected": sums["rows"] - sums["desirable"]}
    known = {name: counts[name.split("/")[1]] for name in _SIDES}
    result = {name: sums[name] / count for name, count in known.items() if count}
    if all(counts.values()):
        result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
    return result | {"kl": sums["kl"] / sums["rows"]}


def rates(sums: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Throughput over all ranks."""
    rows = "pairs_per_second" if "rewards/accuracies" in sums else "answers_per_second"
    seconds = max(seconds, 1e-9)
    return {rows: sums["rows"] / seconds, "tokens_per_second": sums["tokens"] / seconds}


def utilisation(sums: Mapping[str, float], seconds: float, matrix_rate: float) -> dict[str, float]:
    """Model FLOPs utilisation: useful operations a second, as a share of `matrix_rate`, that of all ranks."""
    return {"mfu": sums["flops"] / max(seconds, 1e-9) / matrix_rate}


def peak_memory_gib(device: torch.device) -> float:
    """The most that was ever held: by tensors on a GPU; on the CPU by the process, its libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


_IN_WORDS = {
    "loss": ("loss", ".4f"),
    "rewards/accuracies": ("reward accuracy", ".2f"),
    "rewards/margins": ("margin", ".3f"),
    "mean_token_accuracy": ("token accuracy", ".2f"),
    "valid/reward": ("reward", ".3f"),
    "valid/finished_share": ("finished", ".2f"),
    "valid/kl": ("KL", ".3f"),
}


def sentence(step: int, total: int, split: str, values: Mapping[str, float]) -> str:
    """One line for a person: `Step 5/20: training loss=0.61, reward accuracy=0.75`."""
    told = [f"{words}={values[name]:{form}}" for name, (words, form) in _IN_WORDS.items() if name in values]
    return f"Step {step}/{total}: {split} {', '.join(told)}"
