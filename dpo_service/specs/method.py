"""A method is one choice on each of three independent axes: pair source x loss x reference.

`METHODS` is that table as data. What a user writes (`method: {type: dpo, dpo: {hyperparameters: ...}}`) names a row;
what the training step gets is a `LossSpec` (loss.py) and a `ReferenceSpec`, and never the name of the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dpo_service.specs.base import AUTO, Auto, Spec
from dpo_service.specs.loss import DpoLoss, LossName, LossSpec, MixName, mix_refusal, mixed, refusal

RowKind = Literal["pairs", "answers", "unpaired", "prompts", "demonstrations"]
"""What a training file must hold: preference pairs, prompts with one answer each, or such with a label each. Where
answers are sampled: prompts, or demonstrations, which are prompts with the answer that samples are measured against."""

PROMPT_KINDS: tuple[RowKind, ...] = ("prompts", "demonstrations")


@dataclass(frozen=True)
class MethodRow:
    """One row of the table of methods."""

    pairs: Literal["dataset", "samples"]
    rows: RowKind
    loss: LossName
    """What it trains unless `loss` among its hyperparameters says otherwise."""
    reference: Literal["initial", "previous", "none"]
    """`previous`: the policy as it was when the present iteration began."""
    sync: Literal["step", "iteration", "never"] | None = None
    """When what samples gets the policy's weights."""


METHODS: dict[str, MethodRow] = {
    "dpo": MethodRow("dataset", "pairs", "sigmoid", "initial"),
    "ipo": MethodRow("dataset", "pairs", "ipo", "initial"),
    "orpo": MethodRow("dataset", "pairs", "orpo", "none"),
    "simpo": MethodRow("dataset", "pairs", "simpo", "none"),
    "kto": MethodRow("dataset", "unpaired", "kto", "initial"),
    "supervised": MethodRow("dataset", "answers", "sft", "none"),
    "online": MethodRow("samples", "prompts", "sigmoid", "initial", "step"),
    "rso": MethodRow("samples", "prompts", "hinge", "initial", "never"),
    "sppo": MethodRow("samples", "prompts", "sppo", "previous", "iteration"),
    "spin": MethodRow("samples", "demonstrations", "sigmoid", "previous", "iteration"),
    "self_rewarding": MethodRow("samples", "prompts", "sigmoid", "previous", "iteration"),
}

Weight = Annotated[float, Field(ge=0, le=100)]


class SupervisedHyperparameters(Spec):
    batch_size: Auto[Annotated[int, Field(ge=1, le=256)]] = AUTO
    """Rows a step, over all workers."""
    learning_rate_multiplier: Auto[Annotated[float, Field(gt=0)]] = AUTO
    n_epochs: Auto[Annotated[int, Field(ge=1, le=50)]] = AUTO

    def loss_options(self) -> dict[str, float]:
        """The numbers of the loss that the user chose; what is left out is the service's to decide."""
        given = self.model_dump(include=set(LossSpec.model_fields))
        return {name: value for name, value in given.items() if value != AUTO}


class DpoHyperparameters(SupervisedHyperparameters):
    """Which of these a loss takes is in `LOSS_TABLE`; one that it does not take is refused."""

    loss: DpoLoss | None = "sigmoid"
    """Null where `losses` takes its place."""
    losses: dict[MixName, Annotated[float, Field(gt=0, le=100)]] | None = None
    """Several losses by weight, instead of `loss` (MPO); `sft` is the chosen answer's likelihood. A number goes to
    those of them that take it; what is left out is what each one's authors use."""
    beta: Auto[Annotated[float, Field(gt=0)]] = AUTO
    """Strength of the pull towards the reference (arXiv:2305.18290, eq. 7); at most 2, `sigmoid_norm` 100."""
    label_smoothing: Auto[Annotated[float, Field(ge=0, lt=0.5)]] = AUTO
    """Assumed share of flipped labels (`sigmoid`: conservative DPO; `robust`; `exo_pair`)."""
    discopop_tau: Auto[Annotated[float, Field(gt=0, lt=1)]] = AUTO
    length_penalty: Auto[Annotated[float, Field(ge=0, le=10)]] = AUTO
    """R-DPO's alpha, nats a token (`sigmoid`, `robust`, `hinge`)."""
    rpo_alpha: Auto[Weight] = AUTO
    """Weight of the chosen answer's negative log-likelihood per token (RPO; all but `apo_down`)."""
    wpo: bool = False
    """Weigh each pair by the likelihood of its answers under the policy, as if it had said them itself (WPO)."""
    ld_alpha: Auto[Annotated[float, Field(ge=0, le=1)]] = AUTO
    """What tokens past the shorter answer's length count, against length bias (LD-DPO; all but `sigmoid_norm`)."""

    @field_validator("losses")
    @classmethod
    def _is_a_mix(cls, value: dict[MixName, float] | None) -> dict[MixName, float] | None:
        if value is None:
            return None
        if len(value) < 2 or set(value) == {"sft"}:
            raise ValueError("a mix has two losses or more, with one on pairs among them; for a single one use `loss`")
        if "sft" in value and "apo_down" in value:
            raise ValueError(
                "`sft` raises the chosen answer's likelihood, which `apo_down` is for lowering; remove one"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _losses_for_loss(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("losses") is not None:
            return {"loss": None, **values}
        return values

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.loss is None) == (self.losses is None):
            raise ValueError("loss and losses exclude each other; give one of them")
        return self

    @field_validator("beta", "label_smoothing", "discopop_tau", "length_penalty", "rpo_alpha", "ld_alpha")
    @classmethod
    def _used_by_the_loss(cls, value: Auto[float], info: ValidationInfo) -> Auto[float]:
        assert info.field_name is not None
        if value == AUTO or not {"loss", "losses"} <= info.data.keys():
            return value
        if losses := info.data.get("losses"):
            why = mix_refusal(losses, info.field_name, value)
        elif loss := info.data["loss"]:
            why = refusal(loss, info.field_name, value)
        else:
            why = None  # neither is given, which is refused as such
        if why:
            raise ValueError(why)
        return value


class IpoHyperparameters(SupervisedHyperparameters):
    beta: Auto[Annotated[float, Field(gt=0, le=2)]] = AUTO
    """Half the inverse of the margin it trains towards (tau of arXiv:2310.12036)."""
    length_normalize: bool = True
    """Mean over an answer's tokens, as the authors advise and TRL does; false = their sum, as OpenRLHF does."""
    rpo_alpha: Auto[Weight] = AUTO
    wpo: bool = False


class OrpoHyperparameters(SupervisedHyperparameters):
    lam: Auto[Annotated[float, Field(gt=0, le=10)]] = AUTO
    """Weight of the odds-ratio term (lambda of arXiv:2403.07691; TRL calls it beta)."""


class SimpoHyperparameters(SupervisedHyperparameters):
    beta: Auto[Annotated[float, Field(gt=0, le=100)]] = AUTO
    """Scale of the mean log-probability (arXiv:2405.14734); the authors use 2 to 10."""
    gamma_beta_ratio: Auto[Annotated[float, Field(ge=0, le=2)]] = AUTO
    """Target margin divided by beta; the authors use at most 0.8."""
    rpo_alpha: Auto[Weight] = AUTO
    wpo: bool = False


class KtoHyperparameters(SupervisedHyperparameters):
    batch_size: Auto[Annotated[int, Field(ge=2, le=256)]] = AUTO
    """Answers a step, over all workers; the loss measures against a mean over them."""
    beta: Auto[Annotated[float, Field(gt=0, le=2)]] = AUTO
    """How quickly the value of a reward saturates (arXiv:2402.01306)."""
    desirable_weight: Auto[Annotated[float, Field(gt=0, le=100)]] = AUTO
    """lambda_D; the authors keep desirable_weight n_desirable / (undesirable_weight n_undesirable) within 1 to 4/3."""
    undesirable_weight: Auto[Annotated[float, Field(gt=0, le=100)]] = AUTO


class SampledHyperparameters(SupervisedHyperparameters):
    """Of losses on sampled pairs; `batch_size` counts pairs."""

    beta: Auto[Annotated[float, Field(gt=0, le=2)]] = AUTO
    """Strength of the pull towards the reference."""


class OnlineHyperparameters(SampledHyperparameters):
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """As Direct Alignment from Preferences compares them (arXiv:2402.04792)."""


class RsoHyperparameters(SampledHyperparameters):
    loss: Literal["hinge", "sigmoid"] = "hinge"
    """`hinge` is the authors' hinge-norm loss (arXiv:2309.06657, eq. 10)."""
    accepted: Annotated[int, Field(ge=2, le=64)] = 8
    """Candidates a prompt that are accepted, at most; two make a pair."""
    rejection_beta: Annotated[float, Field(gt=0)] = 0.5
    """In units of the judge's score: towards 0 the best candidates are taken, towards infinity all alike."""


class SppoHyperparameters(SampledHyperparameters):
    win_scale: Annotated[float, Field(gt=0)] = 1.0
    """By so much must a score be higher to win with probability 0.73, where the judge scores and does not compare."""


class DpoMethod(Spec):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class IpoMethod(Spec):
    hyperparameters: IpoHyperparameters = IpoHyperparameters()


class OrpoMethod(Spec):
    hyperparameters: OrpoHyperparameters = OrpoHyperparameters()


class SimpoMethod(Spec):
    hyperparameters: SimpoHyperparameters = SimpoHyperparameters()


class KtoMethod(Spec):
    hyperparameters: KtoHyperparameters = KtoHyperparameters()


class SupervisedMethod(Spec):
    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class OnlineMethod(Spec):
    hyperparameters: OnlineHyperparameters = OnlineHyperparameters()


class RsoMethod(Spec):
    hyperparameters: RsoHyperparameters = RsoHyperparameters()


class SppoMethod(Spec):
    hyperparameters: SppoHyperparameters = SppoHyperparameters()


class SpinMethod(Spec):
    hyperparameters: SampledHyperparameters = SampledHyperparameters()


class SelfRewardingMethod(Spec):
    hyperparameters: SampledHyperparameters = SampledHyperparameters()


_DEFAULT_BLOCKS: dict[str, Any] = {
    "dpo": DpoMethod(),
    "ipo": IpoMethod(),
    "orpo": OrpoMethod(),
    "simpo": SimpoMethod(),
    "kto": KtoMethod(),
    "supervised": SupervisedMethod(),
    "online": OnlineMethod(),
    "rso": RsoMethod(),
    "sppo": SppoMethod(),
    "spin": SpinMethod(),
    "self_rewarding": SelfRewardingMethod(),
}


class MethodSpec(Spec):
    """The method as the user names it. The block under the method's own name holds its hyperparameters."""

    type: Literal["dpo", "ipo", "orpo", "simpo", "kto", "supervised", "online", "rso", "sppo", "spin", "self_rewarding"]
    dpo: DpoMethod | None = None
    ipo: IpoMethod | None = None
    orpo: OrpoMethod | None = None
    simpo: SimpoMethod | None = None
    kto: KtoMethod | None = None
    supervised: SupervisedMethod | None = None
    online: OnlineMethod | None = None
    rso: RsoMethod | None = None
    sppo: SppoMethod | None = None
    spin: SpinMethod | None = None
    self_rewarding: SelfRewardingMethod | None = None

    @model_validator(mode="after")
    def _block_matches_type(self) -> Self:
        stray = [name for name in METHODS if name != self.type and getattr(self, name) is not None]
        if stray:
            raise ValueError(f"method.{stray[0]} is set but method.type is {self.type!r}; remove one of the two")
        return self

    @property
    def row(self) -> MethodRow:
        return METHODS[self.type]

    @property
    def hyperparameters(self) -> SupervisedHyperparameters:
        """The hyperparameters of the named method, in the class of its own."""
        block = getattr(self, self.type) or _DEFAULT_BLOCKS[self.type]
        return cast(SupervisedHyperparameters, block.hyperparameters)

    @property
    def loss(self) -> LossSpec:
        """The loss with every number decided."""
        asked = self.hyperparameters
        if isinstance(asked, DpoHyperparameters) and asked.losses is not None:
            return mixed(asked.losses, asked.loss_options())
        choose = DpoHyperparameters | OnlineHyperparameters | RsoHyperparameters
        name = (asked.loss if isinstance(asked, choose) else None) or self.row.loss
        return LossSpec.model_validate({"name": name, **asked.loss_options()})


class RefreshSpec(Spec):
    """Every `every_steps` steps (tau) the reference becomes alpha * policy + (1 - alpha) * reference (TR-DPO,
    arXiv:2404.09656): alpha 1 is the hard update, less the soft one. With LoRA it is the adapters that are mixed."""

    every_steps: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0, le=1)] = 1.0


class ReferenceSpec(Spec):
    """Which policy the loss measures against, and how its log-probabilities are had.

    `cached` computes them once, before training, as part of the dataset; `live` keeps a frozen copy beside the policy;
    `none` is for losses without a reference. It is the initial policy, pinned by digest at the start; a live one may
    follow the policy (`refresh`).
    """

    mode: Literal["cached", "live", "none"]
    refresh: RefreshSpec | None = None
