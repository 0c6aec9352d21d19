"""The plan of a job: what it takes on a device, and whether it fits. What `dpo plan` prints and the API answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dpo_service.errors import InvalidSpec
from dpo_service.planning.choose import STRATEGIES, Choice, Question, choose, fixes
from dpo_service.planning.gpus import DEVICES, Device
from dpo_service.planning.memory import CUDA_FRAMEWORK, Recipe, trained_parameters
from dpo_service.planning.shape import ModelShape
from dpo_service.planning.speed import forward_operations
from dpo_service.planning.workload import Lengths, load_of
from dpo_service.specs.base import AUTO, Spec
from dpo_service.specs.job import JobSpec
from dpo_service.specs.run import RunSpec

DEFAULT_GPU = "H100-80"
WORTH_SAYING = 0.97
"""Of a step's time; a smaller gain is below what the model knows."""


class Part(Spec):
    name: str
    bytes: int


class PlanFix(Spec):
    """A change under which it fits."""

    text: str
    change: dict[str, Any]
    """Fields of the job by their paths; empty where the change is another device."""
    bytes: int
    """A device then needs."""
    step_seconds: float


class Elsewhere(Spec):
    """The same job on as many of another device."""

    gpu: str
    fits: bool
    total_seconds: float
    gpu_hours: float


class Plan(Spec):
    gpu: str
    workers: int
    parameters: int
    trained_parameters: int
    fits: bool
    bytes: int
    """One device needs, at its peak."""
    limit: int | None
    """It may take; None = not known."""
    parts: tuple[Part, ...]
    peak: str
    """Where in a step the peak lies."""
    strategy: str
    micro_batch_size: int
    micro_batch_tokens: int
    largest_micro_batch: int
    """Tokens of the largest micro-batch that the rows make."""
    activation_checkpointing: bool
    tokens_a_step: float
    steps: int
    step_seconds: float
    communication_share: float
    """Of a step's time, that waits for other devices."""
    utilisation: float
    """Useful operations against the device's dense rate."""
    bound: str
    """What takes the most of a step: arithmetic, communication or memory bandwidth."""
    reference_seconds: float
    """Computing the reference's log-probabilities beforehand."""
    total_seconds: float
    gpu_hours: float
    better: PlanFix | None = None
    """The fastest way that fits of what the job leaves open, where that is not what the service decides by itself."""
    fixes: tuple[PlanFix, ...] = ()
    """Where it does not fit: each of these makes it fit."""
    elsewhere: tuple[Elsewhere, ...] = ()
    notes: tuple[str, ...] = ()
    """What is not counted."""


def device(name: str) -> Device:
    """By its name. Raises InvalidSpec."""
    found = next((device for key, device in DEVICES.items() if key.lower() == name.lower().replace(" ", "-")), None)
    if found is None:
        raise InvalidSpec(f"there is no GPU {name!r} to plan for; there are {', '.join(DEVICES)}", param="gpu")
    return found


def device_of(run: RunSpec) -> str:
    """What a plan is made for where nobody named a device."""
    return DEFAULT_GPU if run.resources.gpus_per_worker else "cpu"


def make_plan(
    spec: JobSpec, run: RunSpec, shape: ModelShape, lengths: Lengths, device: Device, host_memory: int | None = None
) -> Plan:
    """The plan of `run`, which `spec` became, over the rows of `lengths`.

    `host_memory` is what the machine has, for workers on CPUs; they share it.
    """
    if not device.cuda and host_memory:
        device = replace(device, memory=host_memory / run.resources.workers)
    question = replace(_question(run, shape, lengths, device), shards=_shards(spec))
    choice = choose(question)
    found = [] if choice.fits(device) else fixes(question)
    return _plan(question, choice, run).model_copy(
        update={
            "better": _better(spec, question, choice),
            "fixes": tuple(_fix(f.text, f.change, f.choice) for f in found),
            "elsewhere": _elsewhere(question, run) if device.cuda else (),
            "notes": (*_guess_note(shape), *_samplers_note(run)),
        }
    )


def _guess_note(shape: ModelShape) -> tuple[str, ...]:
    if not shape.guessed:
        return ()
    return (
        f"The parameters of the family {shape.family!r} are estimated as if it were Llama's: neither transformers nor "
        "the weight files are here to count them.",
    )


def _samplers_note(run: RunSpec) -> tuple[str, ...]:
    """Where a run samples its pairs."""
    if run.online is None:
        return ()
    counted = "This counts the trainer alone, and of a step neither sampling nor judging"
    samplers = run.online.samplers
    if samplers.shares_device:
        return (
            f"{counted}. The sampler on the same device is left out too: asleep it keeps its CUDA context and graphs "
            f"there (over {CUDA_FRAMEWORK / 2**30:.1f} GiB) and its weights in the host's memory; awake it needs its "
            "weights and cache beside the trainer's weights and optimizer state.",
        )
    kind, number = ("GPU", samplers.booked_gpus) if samplers.gpus else ("CPU", samplers.booked_cpus)
    plural = "s" if number > 1 else ""
    return (f"{counted}: sampling takes {number} more {kind}{plural}.",)


def _fix(text: str, change: dict[str, Any], choice: Choice) -> PlanFix:
    return PlanFix(text=text, change=change, bytes=choice.memory.total, step_seconds=choice.speed.step)


def _better(spec: JobSpec, question: Question, decided: Choice) -> PlanFix | None:
    """What the job leaves open, chosen for this device."""
    free = replace(
        question,
        tokens=None if spec.micro_batch_tokens == AUTO else question.tokens,
        strategies=STRATEGIES if spec.resources.strategy == AUTO and _shards(spec) else question.strategies,
        checkpointing=(False, True) if spec.activation_checkpointing == AUTO else question.checkpointing,
    )
    best = choose(free)
    faster = best.speed.step < WORTH_SAYING * decided.speed.step or not decided.fits(question.device)
    if not faster or not best.fits(question.device):
        return None
    change: dict[str, Any] = {"micro_batch_tokens": best.tokens} if best.work != decided.work else {}
    if best.recipe.strategy != decided.recipe.strategy:
        change["resources.strategy"] = best.recipe.strategy
    if best.recipe.checkpointing != decided.recipe.checkpointing:
        change["activation_checkpointing"] = best.recipe.checkpointing
    text = ", ".join(f"{field}: {str(value).lower()}" for field, value in change.items())
    return _fix(f"set {text}", change, best)


def _shards(spec: JobSpec) -> bool:
    """As the job's own checks have it."""
    whole = spec.lora is not None and (spec.lora.dora or spec.lora.quantize != "none")
    return spec.optimizer == "adamw" and not whole and spec.reference_refresh is None


def _question(run: RunSpec, shape: ModelShape, lengths: Lengths, device: Device) -> Question:
    assert run.resources.strategy != "auto"
    return Question(
        shape=shape,
        recipe=recipe_of(run, cuda=device.cuda),
        lengths=lengths,
        batch_size=run.batch.batch_size,
        max_length=run.data.max_length,
        device=device,
        rows=run.batch.micro_batch_size,
        tokens=run.batch.micro_batch_tokens,
        strategies=(run.resources.strategy,),
        checkpointing=(run.activation_checkpointing,),
        cores=run.resources.cpus_per_worker,
    )


def recipe_of(run: RunSpec, *, cuda: bool) -> Recipe:
    return Recipe(
        precision=run.precision,
        lora_rank=run.lora.rank if run.lora else 0,
        lora_targets=run.lora.target_modules if run.lora else None,
        four_bits=run.lora is not None and run.lora.quantize == "nf4",
        reference=run.reference.mode,
        workers=run.resources.workers,
        checkpointing=run.activation_checkpointing,
        optimizer=run.optim.optimizer,
        cuda=cuda,
    )


def _plan(question: Question, choice: Choice, run: RunSpec) -> Plan:
    device, recipe, speed = question.device, choice.recipe, choice.speed
    steps = -(-len(question.lengths) // run.batch.batch_size) * run.batch.n_epochs
    steps = run.batch.max_steps or steps
    reference = _reference_seconds(question, recipe)
    total = steps * speed.step + reference
    rate = device.float32 if recipe.precision == "float32" else device.bfloat16
    return Plan(
        gpu=device.name,
        workers=recipe.workers,
        parameters=question.shape.parameters,
        trained_parameters=trained_parameters(question.shape, recipe),
        fits=choice.fits(device),
        bytes=choice.memory.total,
        limit=int(device.usable) or None,
        parts=tuple(Part(name=name, bytes=size) for name, size in choice.memory.parts.items()),
        peak=choice.memory.peak,
        strategy=recipe.strategy,
        micro_batch_size=question.rows,
        micro_batch_tokens=choice.tokens,
        largest_micro_batch=choice.work.largest.tokens,
        activation_checkpointing=recipe.checkpointing,
        tokens_a_step=choice.work.tokens,
        steps=steps,
        step_seconds=speed.step,
        communication_share=speed.exposed / speed.step,
        utilisation=speed.useful / speed.step / (rate * (1 if device.cuda else question.cores)),
        bound=speed.bound,
        reference_seconds=reference,
        total_seconds=total,
        gpu_hours=total * recipe.workers / 3600 if device.cuda else 0.0,
    )


def _reference_seconds(question: Question, recipe: Recipe) -> float:
    """One forward pass over every row, the workers sharing them."""
    if recipe.reference != "cached":
        return 0.0
    load = load_of(question.lengths.scored, range(len(question.lengths)), packed=question.shape.packs)
    rate = question.device.rate(recipe.precision) * (1 if question.device.cuda else question.cores)
    return forward_operations(question.shape, load) / rate / recipe.workers


def _elsewhere(question: Question, run: RunSpec) -> tuple[Elsewhere, ...]:
    plans = []
    for other in DEVICES.values():
        if other.cuda and other.name != question.device.name:
            asked = replace(question, device=other)
            plans.append(_plan(asked, choose(asked), run))
    return tuple(Elsewhere(gpu=p.gpu, fits=p.fits, total_seconds=p.total_seconds, gpu_hours=p.gpu_hours) for p in plans)
