"""What the service decides where a job says "auto" or nothing. Pure.

batch_size      a twentieth of the training rows, 1 to 32, at least one row a worker: 20 steps an epoch
n_epochs        3 below 2,000 training rows, 2 below 20,000, else 1; 1 where answers are sampled without iterations
micro_batch     of a worker's share of the batch as many rows as hold 4,096 tokens on CPUs, 8,192 on GPUs
learning rate   the loss's own (specs/loss.py) times the multiplier; ten times that with LoRA
max_length      what the model allows, at most 1024
router loss     the weight that the model's configuration gives it
precision       float32 on CPUs, bfloat16 on GPUs
checkpointing   of activations: off on CPUs; on GPUs on where the longest micro-batch would keep over 16 GB of them
strategy        ddp
reference       cached, where the method has one; live where it moves, the base is quantised or answers are sampled
beta and such   what the loss's authors use (specs/loss.py)
seed            drawn
samples         sampled_choices.py
"""

from __future__ import annotations

import secrets
from typing import Literal

from dpo_service import ids
from dpo_service.errors import InvalidSpec
from dpo_service.jobs import sampled_choices
from dpo_service.registry.tables import File
from dpo_service.specs.base import chosen_or
from dpo_service.specs.data import DataSpec
from dpo_service.specs.eval import BestSpec, ranking_metrics
from dpo_service.specs.job import JobSpec
from dpo_service.specs.loss import LOSS_TABLE, LossSpec
from dpo_service.specs.method import ReferenceSpec
from dpo_service.specs.optim import OptimSpec
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.run import BatchSpec, ModelSource, Precision, RunSpec

DEFAULT_MAX_LENGTH = 1024
LORA_FACTOR = 10.0
CPU_MICRO_BATCH_TOKENS, GPU_MICRO_BATCH_TOKENS = 4096, 8192
"""On two cores a row of 8,192 tokens is no faster than two of half its length, and takes more memory."""
MAX_AUTO_BATCH = 32
STEPS_AN_EPOCH = 20
ACTIVATION_BYTES = 65
"""Kept for the backward pass by a token in a layer, per unit of the hidden size: measured on a Llama block whose
feed-forward part is 3.5 times as wide, with bfloat16 arithmetic. Recomputed, a layer keeps 6 of them."""
ACTIVATION_LIMIT = 16 * 2**30
"""A fifth of a GPU with 80 GB. Below it memory is not short; above it the third more arithmetic buys longer rows."""


def decide(
    spec: JobSpec,
    *,
    job_id: str,
    source: ModelSource,
    training: File,
    validation: File | None,
    rows: int,
    max_length: int,
    layer_width: int,
    router_coef: float | None,
    seed: int,
    mix: File | None = None,
    reward_model: ModelSource | None = None,
) -> RunSpec:
    """The run. `rows` is how many there are to train on; `layer_width` the model's layers times its hidden size;
    `router_coef` is that of its configuration, None for a dense one. `mix` is a file of pairs to train on among sampled
    ones, `reward_model` where the judge's model lies.

    Raises:
        InvalidSpec: the batch, the workers and the rows do not go together, or the model has no router.
    """
    batch = _batch(spec, rows)
    return RunSpec(
        job_id=job_id,
        method=spec.method.type,
        model=source,
        data=_data(spec, training, validation, mix, max_length, seed),
        loss=_loss(spec),
        reference=ReferenceSpec(mode=_reference(spec), refresh=sampled_choices.refresh(spec, batch, rows)),
        optim=_optim(spec),
        batch=batch,
        precision=_precision(spec),
        activation_checkpointing=_activation_checkpointing(spec, batch, max_length, layer_width),
        compile=spec.compile,
        router_aux_loss_coef=_router(spec, router_coef),
        lora=spec.lora,
        resources=_resources(spec),
        seed=seed,
        logging_steps=spec.logging_steps,
        eval_every_steps=spec.eval.every_steps,
        save_every_steps=spec.checkpoint.every_steps,
        keep_checkpoints=spec.checkpoint.keep_last,
        keep_best=_keep_best(spec),
        integrations=spec.integrations or (),
        online=sampled_choices.online(spec, batch, rows=rows, max_length=max_length, reward_model=reward_model),
        output_model=ids.fine_tuned_model_id(spec.model, spec.suffix, job_id),
    )


def seed(spec: JobSpec) -> int:
    return spec.seed if spec.seed is not None else secrets.randbelow(2**31)


def max_length(spec: JobSpec, allowed: int) -> int:
    """Tokens of prompt plus answer. Raises InvalidSpec where the model allows fewer than the job asks for."""
    if spec.max_length is None:
        return min(allowed, DEFAULT_MAX_LENGTH)
    if spec.max_length > allowed:
        raise InvalidSpec(
            f"max_length {spec.max_length:,} is beyond what model {spec.model!r} can attend to; "
            f"use at most {allowed:,}",
            param="max_length",
        )
    return spec.max_length


def _batch(spec: JobSpec, rows: int) -> BatchSpec:
    asked, workers = spec.method.hyperparameters, spec.resources.workers
    least = 2 if spec.method.row.rows == "unpaired" or spec.mix is not None else 1
    size = chosen_or(asked.batch_size, max(workers, least, min(MAX_AUTO_BATCH, rows // STEPS_AN_EPOCH)))
    _require_fit(spec, size, rows)
    share = -(-size // workers)
    tokens = GPU_MICRO_BATCH_TOKENS if spec.resources.gpus_per_worker else CPU_MICRO_BATCH_TOKENS
    return BatchSpec(
        batch_size=size,
        micro_batch_size=chosen_or(spec.micro_batch_size, share),
        micro_batch_tokens=chosen_or(spec.micro_batch_tokens, tokens),
        n_epochs=chosen_or(asked.n_epochs, _epochs(spec, rows)),
        max_steps=spec.max_steps,
    )


def _epochs(spec: JobSpec, rows: int) -> int:
    if spec.method.row.sync in ("step", "never"):
        return 1
    return 3 if rows < 2_000 else 2 if rows < 20_000 else 1


def _require_fit(spec: JobSpec, size: int, rows: int) -> None:
    workers = spec.resources.workers
    noun = {"pairs": "pairs", "prompts": "prompts"}.get(spec.method.row.rows, "rows")
    param = f"method.{spec.method.type}.hyperparameters.batch_size"
    if workers > rows:
        raise InvalidSpec(
            f"there are {rows} usable {noun} to train on, and {workers} workers need at least one each; "
            f"use at most {rows} workers",
            param="resources.workers",
        )
    if size > rows:
        raise InvalidSpec(
            f"there are {rows} usable {noun} to train on; batch_size {size} cannot be filled; use at most {rows}",
            param=param,
        )
    if size < workers:
        raise InvalidSpec(
            f"batch_size {size} gives {workers} workers less than one of the {noun} each; "
            f"use a batch_size of at least {workers}, or fewer workers",
            param=param,
        )


def _data(spec: JobSpec, training: File, validation: File | None, mix: File | None, length: int, seed: int) -> DataSpec:
    return DataSpec(
        rows=spec.method.row.rows,
        training_file=training.key,
        training_name=training.name,
        validation_file=validation.key if validation else None,
        validation_name=validation.name if validation else None,
        eval_split=spec.eval.split,
        max_length=length,
        truncation=spec.truncation,
        answer_room=sampled_choices.answer_room(spec, length),
        mix_file=mix.key if mix else None,
        mix_name=mix.name if mix else None,
        deduplicate=spec.deduplicate,
        shuffle=spec.shuffle,
        seed=seed,
    )


def _loss(spec: JobSpec) -> LossSpec:
    return spec.method.loss


def _reference(spec: JobSpec) -> Literal["cached", "live", "none"]:
    if spec.method.row.reference == "none":
        return "none"
    if spec.reference == "auto":
        moves = spec.reference_refresh or sampled_choices.sampled(spec)
        return "live" if moves or (spec.lora and spec.lora.quantize != "none") else "cached"
    return spec.reference


def _keep_best(spec: JobSpec) -> BestSpec | None:
    asked = spec.checkpoint
    if not asked.keep_best:
        return None
    known = ranking_metrics(spec.method.row.rows)
    metric = asked.metric or next(iter(known))
    return BestSpec(keep=asked.keep_best, metric=metric, better=known[metric], publish=asked.publish == "best")


def _optim(spec: JobSpec) -> OptimSpec:
    default = LOSS_TABLE[spec.method.loss.name].learning_rate * (LORA_FACTOR if spec.lora else 1.0)
    multiplier = chosen_or(spec.method.hyperparameters.learning_rate_multiplier, 1.0)
    return OptimSpec(
        optimizer=spec.optimizer,
        learning_rate=spec.learning_rate if spec.learning_rate is not None else default * multiplier,
        lr_schedule=spec.lr_schedule,
        warmup_ratio=spec.warmup_ratio,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
    )


def _activation_checkpointing(spec: JobSpec, batch: BatchSpec, length: int, layer_width: int) -> bool:
    """The longest pair goes alone where it exceeds the budget, and holds at most twice `length` tokens."""
    kept = ACTIVATION_BYTES * layer_width * max(batch.micro_batch_tokens, 2 * length)
    return chosen_or(spec.activation_checkpointing, bool(spec.resources.gpus_per_worker) and kept > ACTIVATION_LIMIT)


def _resources(spec: JobSpec) -> ResourceSpec:
    return spec.resources.model_copy(update={"strategy": chosen_or(spec.resources.strategy, "ddp")})


def _router(spec: JobSpec, own: float | None) -> float:
    asked = chosen_or(spec.router_aux_loss_coef, own or 0.0)
    if asked and own is None:
        raise InvalidSpec(
            f"model {spec.model!r} has no experts whose load could be balanced; remove router_aux_loss_coef",
            param="router_aux_loss_coef",
        )
    if asked and spec.compile:
        raise InvalidSpec(
            "compiled layers do not show their routers' logits; set compile to false, or router_aux_loss_coef to 0",
            param="compile",
        )
    return asked


def _precision(spec: JobSpec) -> Precision:
    if spec.precision != "auto":
        return spec.precision
    return "bfloat16" if spec.resources.gpus_per_worker else "float32"
