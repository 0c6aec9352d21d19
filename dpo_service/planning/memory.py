"""Bytes of one device by part, at the moment of a step that needs the most.

    head         all layers' activations are there, and a chunk of logits              <- the peak of a full micro-batch
    last layer   the same as its backward pass begins; with checkpointing, its activations computed again
    embedding    activations have gone, gradients are all there, and the embedding's own on its way   <- of a small one
    optimizer    weights, gradients and moments, and the buckets in which gradients are summed over workers

What a layer keeps for its backward pass is counted from what autograd saves for a Llama layer of transformers (widths
per token, H hidden, I intermediate, Q queries, K keys; a test holds it to autograd's own record):

    float32      4 H residuals and norms, 2 H inputs of matrices, 4 I, 3 Q, 2 K, and 2 K for each token that a rejected
                 answer sees (its own and its prompt's, joined anew)
    bfloat16     the same 4 H in float32; what the matrices take in bfloat16, once for each matrix: autocast casts for
                 each; and every weight once more in bfloat16, which the backward pass reads
    pure         2 H of the norms in float32, all else as float32 in half the bytes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from dpo_service.planning.shape import ModelShape, adapted
from dpo_service.specs.optim import OptimizerName
from dpo_service.specs.room import BUCKET_BYTES, KEPT_LOGITS, chunk_tokens
from dpo_service.specs.run import Precision

FLOAT32, BFLOAT16 = 4, 2
FOUR_BITS = 0.5 + 0.127 / 8
CPU_FRAMEWORK = 420 << 20
"""Resident size of a worker that has imported torch and transformers."""
CUDA_FRAMEWORK = 1200 << 20
"""The CUDA context, kernels, cuBLAS workspaces and NCCL's buffers."""

Strategy = Literal["ddp", "fsdp"]
Reference = Literal["none", "cached", "live"]
PARTS = (
    "weights",
    "weights in bfloat16",
    "gathered",
    "gradients",
    "optimizer",
    "reference",
    "activations",
    "output head",
    "communication",
    "framework",
)


@dataclass(frozen=True)
class Recipe:
    """What a run's memory and time depend on beside the model and the rows."""

    precision: Precision = "float32"
    lora_rank: int = 0
    """0 trains every weight."""
    lora_targets: tuple[str, ...] | None = None
    four_bits: bool = False
    """The frozen base's matrices under an adapter are kept in 4 bits."""
    reference: Reference = "cached"
    strategy: Strategy = "ddp"
    workers: int = 1
    checkpointing: bool = False
    """Layers keep their input alone and are computed again in the backward pass."""
    optimizer: OptimizerName = "adamw"
    cuda: bool = True
    accumulates: bool = True
    """A worker's share of a step is more than one micro-batch, so gradients lie there while the next is computed."""

    @property
    def share(self) -> float:
        """Of weights, gradients and optimizer, what one worker keeps."""
        return 1 / self.workers if self.strategy == "fsdp" else 1.0

    @property
    def weight_bytes(self) -> int:
        """Of a weight of the model, and of a number that passes from layer to layer."""
        return BFLOAT16 if self.precision == "pure_bfloat16" else FLOAT32

    @property
    def trained_bytes(self) -> int:
        """Of a weight that is trained, and of its gradient: adapters are float32 always."""
        return FLOAT32 if self.lora_rank else self.weight_bytes

    @property
    def gathered_bytes(self) -> int:
        """Of a number in matrix products, and of a weight that FSDP gathers."""
        return FLOAT32 if self.precision == "float32" else BFLOAT16

    @property
    def casts(self) -> bool:
        """Whether weights are copied for the arithmetic."""
        return self.gathered_bytes != self.weight_bytes

    @property
    def moment_bytes(self) -> float:
        """Of the optimizer's two moments, a weight: as train/optimizers.py keeps them."""
        if self.optimizer == "adamw_8bit":
            return 2 * (1 + 2 / 256)
        if self.optimizer == "adamw_offload":
            masters = 0 if self.trained_bytes == FLOAT32 else FLOAT32
            return 0 if self.cuda else 2 * FLOAT32 + masters
        return 2 * self.trained_bytes


@dataclass(frozen=True)
class Load:
    """A micro-batch, as far as memory and time ask."""

    tokens: int
    """Of the row: a prompt once, and both answers."""
    answers: int
    """Tokens that are predicted."""
    rejoined: int
    """Tokens that the rejected answers see: prompt and rejected answer of each pair."""
    seen: int
    """Sum over the rejected answers of tokens times the tokens they see: entries of their attention masks."""
    attended: int = 0
    """Sum over all tokens of the tokens they attend to."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part, at the peak."""

    parts: Mapping[str, int]
    peak: str
    """Where in a step the peak lies: output head, backward or optimizer."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(shape: ModelShape, recipe: Recipe, load: Load) -> Memory:
    """The peak of a training step on one device, the largest micro-batch being `load`."""
    lasting = _lasting(shape, recipe)
    moments = _moments(shape, recipe, load)
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: int(lasting.get(name, 0) + moments[peak].get(name, 0)) for name in PARTS}
    return Memory(MappingProxyType({name: size for name, size in parts.items() if size}), peak)


def trained_parameters(shape: ModelShape, recipe: Recipe) -> int:
    if recipe.lora_rank:
        return shape.lora_parameters(recipe.lora_rank, recipe.lora_targets)
    return shape.parameters - shape.frozen


def _lasting(shape: ModelShape, recipe: Recipe) -> dict[str, float]:
    """What lies there from the first step to the last."""
    share, trained = recipe.share, trained_parameters(shape, recipe)
    frozen_copy = recipe.reference == "live" and not recipe.lora_rank
    return {
        "weights": (_base_bytes(shape, recipe) + (trained * FLOAT32 if recipe.lora_rank else 0)) * share,
        "optimizer": recipe.moment_bytes * trained * share,
        "reference": shape.parameters * recipe.weight_bytes * share if frozen_copy else 0,
        "framework": CUDA_FRAMEWORK if recipe.cuda else CPU_FRAMEWORK,
    }


def _base_bytes(shape: ModelShape, recipe: Recipe) -> float:
    """Of the model itself. A number of 4 bits has a share of two scales beside it (QLoRA, arXiv 2305.14314, section 3);
    embedding, head, norms and experts stay as they are."""
    if not recipe.four_bits:
        return shape.parameters * recipe.weight_bytes
    packed = shape.matrix_parameters
    return packed * FOUR_BITS + (shape.parameters - packed) * recipe.weight_bytes


def _moments(shape: ModelShape, recipe: Recipe, load: Load) -> dict[str, dict[str, float]]:
    """What comes and goes, at each moment that may be the peak."""
    gradients = trained_parameters(shape, recipe) * recipe.trained_bytes * recipe.share
    kept = gradients if recipe.accumulates else 0
    matrix = 0 if recipe.lora_rank else shape.head_parameters * FLOAT32
    layer, copies = layer_activations(shape, recipe, load), _layer_copies(shape, recipe)
    outside, logits = _outside_layers(shape, load), _logits(shape, recipe, load)
    # A gradient that another one is added to lies there twice: of a head that is the embedding, or in accumulation.
    added = matrix if shape.tied or recipe.accumulates else 0
    kept_layers, begun = shape.layers * layer, 0.0
    kept_copies, gathered = shape.layers * copies, _gathered(shape, recipe)
    if recipe.strategy == "fsdp":
        copies = kept_copies = 0.0
    if recipe.checkpointing:
        kept_layers, begun = shape.layers * recipe.weight_bytes * shape.hidden * load.tokens, layer
        kept_copies = 0.0
    return {
        "head, forward": {
            "gathered": gathered,
            "weights in bfloat16": kept_copies if recipe.lora_rank else shape.layers * copies,
            "gradients": kept,
            "activations": kept_layers + outside,
            "output head": logits + _kept_logits(shape, recipe, load) + _head_copy(shape, recipe),
        },
        "head, backward": {
            "gathered": gathered,
            "weights in bfloat16": kept_copies,
            "gradients": kept + matrix,
            "activations": kept_layers + outside,
            "output head": _head_work(shape, recipe, logits),
        },
        "last layer": {
            "gathered": gathered,
            "weights in bfloat16": kept_copies + (copies if recipe.checkpointing else 0),
            "gradients": kept + matrix,
            "activations": kept_layers + begun + _layer_work(shape, recipe, load),
        },
        "embedding": {
            "gathered": gathered,
            "gradients": gradients + added,
            "activations": FLOAT32 * 2 * shape.hidden * load.tokens,
        },
        "optimizer": {
            "gradients": gradients,
            "communication": min(2 * BUCKET_BYTES, gradients) if recipe.strategy == "ddp" and recipe.workers > 1 else 0,
        },
    }


def layer_activations(shape: ModelShape, recipe: Recipe, load: Load) -> float:
    """Bytes that one layer keeps for its backward pass, without the copies of its weights."""
    # On CUDA one kernel attends to the whole row: nothing is joined anew, and there is no mask to keep.
    rejoined = 0 if recipe.cuda else 2 * shape.keys * load.rejoined + load.seen
    # Of attention that keeps its probabilities: every token of a padded row has one for each other.
    squares = 0 if shape.packs else 2 * load.attended * shape.kept_square
    return load.tokens * _widths(shape, recipe) + recipe.gathered_bytes * rejoined + squares


def _widths(shape: ModelShape, recipe: Recipe) -> float:
    """Bytes a token. What was measured in float32 changes with the recipe as a Llama layer's does."""
    counted = _counted_widths(shape, recipe)
    if not shape.kept_width:
        return counted
    return counted * shape.kept_width / _counted_widths(shape, Recipe())


def _counted_widths(shape: ModelShape, recipe: Recipe) -> float:
    """Bytes a token. Two norms keep their inputs in float32 always, and what they normalised where they are trained;
    the matrices what they take."""
    inputs = 5 if recipe.casts else 2
    matrices = inputs * shape.hidden + 4 * shape.intermediate * shape.active_experts
    matrices += 3 * shape.queries + 2 * shape.keys + _adapter_width(shape, recipe)
    normalised = 0 if recipe.lora_rank else 2 * shape.hidden * recipe.weight_bytes
    return FLOAT32 * (2 * shape.hidden + shape.heads + 2) + normalised + recipe.gathered_bytes * matrices


def _adapter_width(shape: ModelShape, recipe: Recipe) -> int:
    wanted = [linear for linear in shape.linears if adapted(linear, recipe.lora_targets)]
    return recipe.lora_rank * sum(linear.count for linear in wanted) // shape.layers


def _gathered(shape: ModelShape, recipe: Recipe) -> float:
    """What FSDP holds whole: a layer and the next one, the embedding and the head, and a layer's gradients, float32."""
    if recipe.strategy == "ddp" or recipe.workers == 1:
        return 0
    outside = shape.head_parameters * (1 if shape.tied else 2)
    trained = 0 if recipe.lora_rank else FLOAT32 * shape.layer_parameters
    return recipe.gathered_bytes * (2 * shape.layer_parameters + outside) + trained


def _outside_layers(shape: ModelShape, load: Load) -> float:
    """The last norm's input, what it normalised and gives; the states that predict, and their gradients."""
    return FLOAT32 * shape.hidden * (3 * load.tokens + 2 * load.answers)


def _layer_copies(shape: ModelShape, recipe: Recipe) -> float:
    """One layer's matrices in the arithmetic's precision, where that is not the weights' own."""
    if not recipe.casts:
        return 0
    return BFLOAT16 * (shape.layer_parameters - shape.layer_vectors)


def _logits(shape: ModelShape, recipe: Recipe, load: Load) -> float:
    """A chunk of logits, float32, and what it was made from."""
    return min(load.answers, _chunk(shape, recipe)) * shape.vocabulary * _logit_bytes(recipe)


def _kept_logits(shape: ModelShape, recipe: Recipe, load: Load) -> float:
    """Those of the first chunk, in float32, while the others are made; the backward pass begins by using them up."""
    chunk = _chunk(shape, recipe)
    kept = recipe.precision == "float32" and load.answers > chunk and chunk * shape.vocabulary <= KEPT_LOGITS
    return FLOAT32 * chunk * shape.vocabulary if kept else 0


def _chunk(shape: ModelShape, recipe: Recipe) -> int:
    return chunk_tokens(shape.vocabulary, _logit_bytes(recipe), cuda=recipe.cuda)


def _logit_bytes(recipe: Recipe) -> int:
    return FLOAT32 if recipe.precision == "float32" else FLOAT32 + BFLOAT16


def _head_copy(shape: ModelShape, recipe: Recipe) -> float:
    return BFLOAT16 * shape.head_parameters if recipe.casts else 0


def _head_work(shape: ModelShape, recipe: Recipe, logits: float) -> float:
    """A chunk of logits and its gradient, the head's weight, and its gradient from one chunk."""
    if recipe.precision == "float32":
        return logits
    # The gradient of the weight comes in bfloat16; a CPU makes a float32 copy of it to add it to the others.
    product = 0 if recipe.lora_rank else (BFLOAT16 if recipe.cuda else BFLOAT16 + FLOAT32) * shape.head_parameters
    return logits + 2 * _head_copy(shape, recipe) + product


def _layer_work(shape: ModelShape, recipe: Recipe, load: Load) -> float:
    """What the backward pass of a layer's MLP holds beside what it keeps: three gradients of its width where one kept
    product has gone, and the residual's gradient."""
    size = FLOAT32 if recipe.precision == "float32" else BFLOAT16
    return size * 2 * shape.intermediate * shape.active_experts * load.tokens + FLOAT32 * shape.hidden * load.tokens
