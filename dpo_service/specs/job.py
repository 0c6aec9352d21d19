"""The document a user submits: OpenAI's fine-tuning request plus our fields. REST, SDK and YAML files share it.

`JobSpec` may say "auto"; `RunSpec` (run.py) is the same job with every number decided, which is what an attempt runs.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.base import AUTO, Auto, Spec
from dpo_service.specs.data import Truncation
from dpo_service.specs.eval import REWARD, CheckpointSpec, EvalSpec, ranking_metrics
from dpo_service.specs.judge import JudgeSpec
from dpo_service.specs.method import MethodSpec, RefreshSpec
from dpo_service.specs.optim import LrSchedule, OptimizerName
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.sampled import AnswersSpec, MixSpec, refusal

Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class WandbIntegration(Spec):
    project: Name
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()


class Integration(Spec):
    type: Literal["wandb"]
    wandb: WandbIntegration


class JobSpec(Spec):
    """A training job as submitted."""

    # OpenAI's fields
    model: Name
    training_file: Name
    validation_file: Name | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: dict[str, str] | None = None
    integrations: tuple[Integration, ...] | None = None
    method: MethodSpec

    # ours
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """The true peak learning rate; excludes a `learning_rate_multiplier`."""
    lr_schedule: LrSchedule = "linear"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    optimizer: OptimizerName = "adamw"
    """`adamw_8bit` keeps its moments in 8 bits, `adamw_offload` in the host's memory."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many steps, whatever `n_epochs` says."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Tokens of prompt plus answer; default: what the model allows, at most 1024."""
    truncation: Truncation = "refuse"
    deduplicate: bool = True
    precision: Literal["auto", "float32", "bfloat16", "pure_bfloat16"] = "auto"
    """`bfloat16`: arithmetic over float32 weights. `pure_bfloat16`: weights and moments too, stochastically rounded."""
    activation_checkpointing: Auto[bool] = AUTO
    """Compute each layer again in the backward pass rather than keep what it computed."""
    compile: bool = False
    """torch.compile the layers. Off unless asked for: on two CPU cores it saved 3 to 9% of a step (40M parameters,
    float32) after 8 to 20 s of compiling, or minutes on a busy machine."""
    router_aux_loss_coef: Auto[Annotated[float, Field(ge=0, le=1)]] = AUTO
    """Weight of the load-balancing loss of a mixture of experts; auto: what the model's configuration says."""
    shuffle: bool = True
    """False keeps the file's order."""
    micro_batch_size: Auto[Annotated[int, Field(ge=1, le=256)]] = AUTO
    """Rows a forward pass on one worker, at most; the rest of its share is accumulated."""
    micro_batch_tokens: Auto[Annotated[int, Field(ge=64, le=2**24)]] = AUTO
    """Tokens a forward pass on one worker, at most, a pair's prompt counted once; a longer row goes alone."""
    reference: Literal["auto", "cached", "live"] = "auto"
    reference_refresh: RefreshSpec | None = None
    """Let the reference follow the policy; it is computed live then."""
    logging_steps: Annotated[int, Field(ge=1)] = 1
    lora: LoraSpec | None = None
    resources: ResourceSpec = ResourceSpec()
    eval: EvalSpec = EvalSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    deploy: bool = False
    """Serve the result as soon as it is published."""

    # where the pairs are sampled
    sampling: AnswersSpec | None = None
    judge: JudgeSpec | None = None
    """Says which of the sampled answers is better."""
    pairing: PairingSpec | None = None
    """Which of the judged answers become a pair; None = the best and the worst."""
    mix: MixSpec | None = None
    """Some pairs of each step come from a file."""

    @field_validator("metadata")
    @classmethod
    def _metadata_limits(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value and len(value) > 16:
            raise ValueError(f"metadata has {len(value)} keys; at most 16 are kept")
        for key, text in (value or {}).items():
            if len(key) > 64 or len(text) > 512:
                raise ValueError(f"metadata[{key[:64]!r}]: keys are at most 64 characters and values 512")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.learning_rate is not None and self.method.hyperparameters.learning_rate_multiplier != AUTO:
            raise ValueError("learning_rate and learning_rate_multiplier exclude each other; give one of them")
        if self.validation_file is not None and self.eval.split > 0:
            raise ValueError("validation_file and eval.split exclude each other; give one of them")
        if self.method.row.reference == "none" and self.reference != "auto":
            raise ValueError(f"method {self.method.type!r} has no reference; remove `reference`")
        if self.reference_refresh is not None:
            self._can_refresh()
        if self.resources.strategy == "fsdp":
            self._can_shard()
        if self.lora is not None and self.lora.quantize != "none":
            self._can_quantize()
        if self.checkpoint.keep_best:
            self._can_keep_best()
        if why := refusal(self):
            raise ValueError(why)
        if self.eval.every_steps is not None and self.validation_file is None and self.eval.split == 0:
            raise ValueError("eval.every_steps needs rows to evaluate on; give validation_file or eval.split")
        return self

    def _can_quantize(self) -> None:
        if not self.resources.gpus_per_worker:
            raise ValueError(
                "lora.quantize computes on GPUs only; set resources.gpus_per_worker to 1, or lora.quantize to none"
            )
        if self.reference == "cached":
            raise ValueError(
                "lora.quantize changes the base model, and the reference is that base: a cached one would be the model "
                "before; remove `reference`, or set it to live"
            )

    def _can_refresh(self) -> None:
        if self.method.row.reference == "none":
            raise ValueError(f"method {self.method.type!r} has no reference to refresh; remove `reference_refresh`")
        if self.reference == "cached":
            raise ValueError(
                "reference_refresh moves the reference, and a cached one cannot move; "
                "remove `reference`, or set it to live"
            )
        assert self.reference_refresh is not None
        if self.precision == "pure_bfloat16" and self.lora is None and self.reference_refresh.alpha < 1:
            raise ValueError(
                "reference_refresh.alpha below 1 mixes the policy into a reference of pure bfloat16, which rounds "
                "small shares away; set alpha to 1, or precision to bfloat16"
            )

    def _can_shard(self) -> None:
        if self.resources.workers == 1:
            raise ValueError(
                "resources.strategy 'fsdp' spreads a model over workers; set resources.workers to 2 or more, "
                "or use 'ddp'"
            )
        if self.optimizer != "adamw":
            raise ValueError(
                f"optimizer {self.optimizer!r} needs whole weights, which resources.strategy 'fsdp' does not keep; "
                "set optimizer to adamw, or use 'ddp'"
            )
        if self.lora is not None and (self.lora.dora or self.lora.quantize != "none"):
            raise ValueError(
                "lora.dora and lora.quantize need whole weights, which resources.strategy 'fsdp' does not keep; "
                "remove them, or use 'ddp'"
            )
        if self.reference_refresh is not None:
            raise ValueError(
                "reference_refresh keeps the reference's weights whole, which resources.strategy 'fsdp' does not; "
                "remove reference_refresh, or use 'ddp'"
            )

    def _can_keep_best(self) -> None:
        metric, known = self.checkpoint.metric, ranking_metrics(self.method.row.rows)
        if self.validation_file is None and self.eval.split == 0:
            raise ValueError("checkpoint.keep_best needs rows to evaluate on; give validation_file or eval.split")
        if not known:
            raise ValueError(
                f"method {self.method.type!r} judges no answers, so nothing says which checkpoint is best; "
                "remove checkpoint.keep_best"
            )
        if metric is not None and metric not in known:
            raise ValueError(
                f"checkpoint.metric {metric!r} ranks no checkpoints of method {self.method.type!r}; "
                f"use one of {', '.join(known)}"
            )
        if self.reference_refresh is not None and REWARD not in known:
            raise ValueError(
                "checkpoint.keep_best compares evaluations, which a reference that moves makes incomparable; "
                "remove checkpoint.keep_best or reference_refresh"
            )
