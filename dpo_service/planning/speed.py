"""Seconds of a step: operations over the rate a device reaches, bytes over the rate of its links.

operations   a weight costs a token 2 forward and 4 backward, 2 backward where it is frozen; the output head only where
             a token is predicted, and 2 more, because its logits are thrown away; attention 12 for each of its width
             and pair of tokens that see each other; checkpointing repeats the layers' forward pass; a live reference
             and KTO's mismatched answers go forward only, 2 a weight
weights      read three times a micro-batch, once more by each pass forward only, and cast once where arithmetic is
             bfloat16: what makes many small micro-batches slow
optimizer    reads and writes weights, gradients and moments once
ddp          one sum of the gradients after the last backward pass: 2 (n-1)/n of their bytes, and the step waits
fsdp         every micro-batch gathers the weights twice and scatters their gradients: 3 (n-1)/n of their bytes, beside
             the arithmetic, and each pass forward only gathers them once more; a step takes the longer of the two
"""

from __future__ import annotations

from dataclasses import dataclass

from dpo_service.planning.gpus import Device
from dpo_service.planning.memory import BFLOAT16, FLOAT32, Load, Recipe, trained_parameters
from dpo_service.planning.shape import ModelShape
from dpo_service.planning.workload import Workload

OPTIMIZER_PASSES = 7
"""Weights, gradients and two moments read; weights and moments written."""


@dataclass(frozen=True)
class Speed:
    """Seconds of a step, by what takes them."""

    compute: float
    memory: float
    """Reading the weights for every micro-batch, and the optimizer's passes over all it holds."""
    communication: float
    exposed: float
    """The part of `communication` that nothing else is done beside."""
    useful: float
    """Operations of a step on one worker that cannot be done without."""

    @property
    def step(self) -> float:
        return self.compute + self.memory + self.exposed

    @property
    def bound(self) -> str:
        parts = {"arithmetic": self.compute, "communication": self.exposed, "memory bandwidth": self.memory}
        return max(parts, key=lambda name: parts[name])


def speed(shape: ModelShape, recipe: Recipe, work: Workload, device: Device, cores: int = 1) -> Speed:
    """A step of the busiest worker. `cores` counts for the cpu alone."""
    many = 1 if device.cuda else cores
    aside = forward_operations(shape, work.forward_only) if work.forward_only else 0.0
    compute = operations(shape, recipe, work.mean) + aside * (2 if recipe.reference == "live" else 1)
    passes = 3 + _forward_only_passes(recipe, work)
    moved = OPTIMIZER_PASSES * FLOAT32 * trained_parameters(shape, recipe) * recipe.share
    moved += work.micro_batches * shape.parameters * (passes * recipe.gathered_bytes + _cast_bytes(recipe))
    communication = _communication(shape, recipe, work, device)
    seconds = compute / (device.rate(recipe.precision) * many)
    overlapped = seconds if recipe.strategy == "fsdp" else 0.0
    return Speed(
        compute=seconds,
        memory=moved / (device.bandwidth * many),
        communication=communication,
        exposed=max(0.0, communication - overlapped),
        useful=useful_operations(shape, recipe, work.mean) + aside,
    )


def _forward_only_passes(recipe: Recipe, work: Workload) -> int:
    """Of a micro-batch: those of a live reference, and of the answers that have no gradient."""
    passes = 1 if work.forward_only is None else 2
    return passes * (2 if recipe.reference == "live" else 1) - 1


def _cast_bytes(recipe: Recipe) -> int:
    """Read and written a weight to have it in bfloat16."""
    return FLOAT32 + BFLOAT16 if recipe.casts else 0


def useful_operations(shape: ModelShape, recipe: Recipe, load: Load) -> float:
    """What `train.flops` counts for utilisation: nothing that is computed twice."""
    passes = 4 if recipe.lora_rank else 6
    adapters = 6 * shape.lora_parameters(recipe.lora_rank, recipe.lora_targets) * load.tokens
    layers = passes * shape.layers * shape.active_layer_parameters * load.tokens
    head = passes * shape.head_parameters * load.answers
    return float(layers + head + adapters + 12 * shape.attending * shape.queries * load.attended)


def operations(shape: ModelShape, recipe: Recipe, load: Load) -> float:
    """What is computed: the useful operations, logits twice, and layers twice with checkpointing."""
    total = useful_operations(shape, recipe, load) + 2 * shape.head_parameters * load.answers
    if recipe.checkpointing:
        total += _layers_forward(shape, load)
    if recipe.reference == "live":
        total += forward_operations(shape, load)
    return total


def forward_operations(shape: ModelShape, load: Load) -> float:
    return _layers_forward(shape, load) + 2 * shape.head_parameters * load.answers


def _layers_forward(shape: ModelShape, load: Load) -> float:
    weights = 2 * shape.layers * shape.active_layer_parameters * load.tokens
    return float(weights + 4 * shape.attending * shape.queries * load.attended)


def _communication(shape: ModelShape, recipe: Recipe, work: Workload, device: Device) -> float:
    """Seconds on the wire a step."""
    workers = recipe.workers
    if workers == 1:
        return 0.0
    around = (workers - 1) / workers / device.wire(workers)
    gradients = trained_parameters(shape, recipe) * recipe.trained_bytes
    if recipe.strategy == "ddp":
        return 2 * around * gradients
    gathers = 2 + _forward_only_passes(recipe, work)
    return around * work.micro_batches * (gathers * shape.parameters * recipe.gathered_bytes + gradients)
