"""The losses as data: what each needs, which numbers it takes, and the authors' defaults for them.

One table answers for both ends: a job that sets a number its loss cannot use is refused by it, and the training step
reads every number from a `LossSpec` it has filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from dpo_service.specs.base import Spec

DpoLoss = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "sigmoid_norm",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "apo_zero",
    "apo_down",
    "discopop",
    "sppo",
]
"""The losses of method `dpo`: pairs, measured against the initial policy."""

MixName = Literal[DpoLoss, "sft"]
LossName = Literal[DpoLoss, "ipo", "orpo", "simpo", "kto", "sft"]


@dataclass(frozen=True)
class LossRow:
    """One row of the table of losses."""

    paper: str
    learning_rate: float
    """Default peak learning rate; a `learning_rate_multiplier` multiplies it."""
    options: Mapping[str, float] = field(default_factory=dict)
    """The numbers it takes, and their defaults."""
    reference: bool = True
    max_beta: float = 2.0


_ANY_PAIR = {"rpo_alpha": 0.0, "wpo": False}
"""What any loss on pairs can carry, but for two: see the table."""
_SUMS = {**_ANY_PAIR, "ld_alpha": 1.0}
"""And what those can that compare sums over the answers' tokens, not means."""

LOSS_TABLE: dict[LossName, LossRow] = {
    "sigmoid": LossRow("arXiv:2305.18290", 5e-6, {"beta": 0.1, "label_smoothing": 0.0, "length_penalty": 0.0, **_SUMS}),
    "robust": LossRow("arXiv:2403.00409", 5e-6, {"beta": 0.1, "label_smoothing": 0.1, "length_penalty": 0.0, **_SUMS}),
    "hinge": LossRow("arXiv:2305.10425", 5e-6, {"beta": 0.1, "length_penalty": 0.0, **_SUMS}),
    "sigmoid_norm": LossRow("arXiv:2411.15124", 5e-7, {"beta": 5.0, **_ANY_PAIR}, max_beta=100.0),
    "exo_pair": LossRow("arXiv:2402.00856", 5e-6, {"beta": 0.1, "label_smoothing": 1e-3, **_SUMS}),
    "nca_pair": LossRow("arXiv:2402.05369", 5e-6, {"beta": 0.01, **_SUMS}),
    "bco_pair": LossRow("arXiv:2404.04656", 5e-6, {"beta": 0.1, **_SUMS}),
    "apo_zero": LossRow("arXiv:2408.06266", 5e-6, {"beta": 0.1, **_SUMS}),
    # No rpo_alpha: this loss is for lowering the chosen answer's likelihood, which that term raises.
    "apo_down": LossRow("arXiv:2408.06266", 5e-6, {"beta": 0.1, "wpo": False, "ld_alpha": 1.0}),
    "discopop": LossRow("arXiv:2406.08414", 5e-6, {"beta": 0.1, "discopop_tau": 0.05, **_SUMS}),
    "sppo": LossRow("arXiv:2405.00675", 5e-7, {"beta": 1e-3, **_SUMS}),
    "ipo": LossRow("arXiv:2310.12036", 5e-6, {"beta": 0.1, "length_normalize": True, **_ANY_PAIR}),
    # No rpo_alpha: it has that term already. No wpo: most of it is that term, which does not compare.
    "orpo": LossRow("arXiv:2403.07691", 8e-6, {"lam": 0.1}, reference=False),
    "simpo": LossRow(
        "arXiv:2405.14734", 5e-7, {"beta": 2.0, "gamma_beta_ratio": 0.5, **_ANY_PAIR}, reference=False, max_beta=100.0
    ),
    "kto": LossRow("arXiv:2402.01306", 1e-6, {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    "sft": LossRow("next-token cross-entropy", 2e-5, reference=False),
}


def refusal(loss: LossName, option: str, value: float) -> str | None:
    """Why `loss` cannot take this value of `option`, with the mend; None where it can."""
    row = LOSS_TABLE[loss]
    if option not in row.options:
        return f"loss {loss!r} has no {option}; remove it, or use {_that_take(option)}"
    if option == "beta" and value > row.max_beta:
        return f"beta should be less than or equal to {row.max_beta:g} with loss {loss!r}"
    if (loss, option) == ("exo_pair", "label_smoothing") and value <= 0:
        return "label_smoothing should be greater than 0 with loss 'exo_pair', which takes its logarithm"
    return None


def _that_take(option: str) -> str:
    return "loss " + " or ".join(repr(name) for name, row in LOSS_TABLE.items() if option in row.options)


_NO_NUMBERS = {"name", "weight", "others"}
_OF_THE_ROW = ("rpo_alpha", "wpo", "ld_alpha")


def mix_refusal(losses: Iterable[MixName], option: str, value: float) -> str | None:
    """Why a mix of `losses` cannot take this value of `option`, with the mend; None where it can.

    What holds for a row as a whole must suit every loss; any other number goes to those that take it.
    """
    names = [name for name in losses if name != "sft"]
    if option == "rpo_alpha" and "sft" in losses:
        return "rpo_alpha is the term that `sft` in `losses` adds; give one of the two"
    refusals = [refusal(name, option, value) for name in names]
    takers = [why for name, why in zip(names, refusals, strict=True) if option in LOSS_TABLE[name].options]
    asked = refusals if option in _OF_THE_ROW or not takers else takers
    return next((why for why in asked if why), None)


def mixed(losses: Mapping[MixName, float], options: Mapping[str, float]) -> LossSpec:
    """Several losses as one: the sum over `losses` of weight times loss, MPO (arXiv:2411.10442 eq. 2).

    `sft` is its generation loss: the chosen answer's negative log-likelihood per token, which is `rpo_alpha`. The
    heaviest other loss, of equals the first in the table, is the one whose beta rewards are told by.
    """
    names = sorted((n for n in losses if n != "sft"), key=lambda n: (-losses[n], list(LOSS_TABLE).index(n)))
    first, *others = (
        {"name": n, "weight": losses[n]} | {o: v for o, v in options.items() if o in LOSS_TABLE[n].options}
        for n in names
    )
    if "sft" in losses:
        first["rpo_alpha"] = losses["sft"]
    rest = [{o: v for o, v in other.items() if o not in ("rpo_alpha", "wpo")} for other in others]
    return LossSpec.model_validate({**first, "others": rest})


class LossSpec(Spec):
    """The loss, every number decided: what is left out becomes the authors' default.

    A number the loss does not use is refused, stays as it is here and is not written down.
    """

    name: LossName
    weight: float = 1.0
    """In a mix."""
    others: tuple[LossSpec, ...] = ()
    """The rest of a mix. What holds for a row as a whole (`rpo_alpha`, `wpo`) is of the first loss."""
    beta: float = 0.0
    label_smoothing: float = 0.0
    length_normalize: bool = False
    """`ipo`: the mean over an answer's tokens, or their sum. These are two different objectives."""
    discopop_tau: float = 0.0
    lam: float = 0.0
    """`orpo`: weight of the odds-ratio term."""
    gamma_beta_ratio: float = 0.0
    """`simpo`: the target margin in units of beta."""
    length_penalty: float = 0.0
    """R-DPO's alpha, nats a token (arXiv:2403.19159)."""
    rpo_alpha: float = 0.0
    """Weight of the chosen answer's negative log-likelihood per token (RPO, arXiv:2404.19733)."""
    desirable_weight: float = 0.0
    """`kto`: lambda_D, and lambda_U below."""
    undesirable_weight: float = 0.0
    wpo: bool = False
    """Weigh each pair by how likely the policy is to say both of its answers (WPO, arXiv:2406.11827)."""
    ld_alpha: float = 1.0
    """What a token past the length of the pair's shorter answer counts, 0 to 1 (LD-DPO, arXiv:2409.06411)."""

    @model_validator(mode="before")
    @classmethod
    def _authors_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("name") not in LOSS_TABLE:
            return values
        if values["name"] == "sft":  # the first release wrote the numbers of `sigmoid` beside it
            values = {name: value for name, value in values.items() if name not in ("beta", "label_smoothing")}
        return {**LOSS_TABLE[values["name"]].options, **values}

    @model_validator(mode="after")
    def _only_what_it_uses(self) -> Self:
        for option, known in type(self).model_fields.items():
            value = getattr(self, option)
            why = refusal(self.name, option, value) if option not in _NO_NUMBERS else None
            if why and (value != known.default or option in LOSS_TABLE[self.name].options):
                raise ValueError(why)
        return self

    @model_serializer(mode="wrap")
    def _without_the_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        alone = {"weight", "others"} if self.weight == 1 and not self.others else set()
        return {name: v for name, v in values.items() if self.uses(name) or name in _NO_NUMBERS - alone}

    def uses(self, option: str) -> bool:
        return option in LOSS_TABLE[self.name].options

    @property
    def parts(self) -> tuple[LossSpec, ...]:
        """The losses that are summed by their `weight`; one, unless it is a mix."""
        return (self, *self.others)

    def has(self, name: LossName) -> bool:
        return any(part.name == name for part in self.parts)
