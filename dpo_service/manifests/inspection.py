"""What transformers knows of a model directory before a weight is read."""

from __future__ import annotations

from typing import Any

from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.base import Spec


class SampleRow(Spec):
    """A row of the job's training file, as text and conversations."""

    line: int
    texts: tuple[str, ...] = ()
    """The prompt, then the prompt with each of its answers."""
    conversations: tuple[tuple[dict[str, Any], ...], ...] = ()
    """The same, where a chat template renders it."""
    tools: tuple[dict[str, Any], ...] | None = None


class InspectionRequest(Spec):
    """What is inspected, and for which job."""

    directory: str
    """A local directory in the Hugging Face layout."""
    weights_here: bool = True
    """False where only the model's description has been fetched from the hub."""
    lora: LoraSpec | None = None
    """The adapter that the job trains."""
    samples: tuple[SampleRow, ...] = ()
    """Some of the job's rows (`rows/sample.py`). Without them the model is looked at alone."""
    sized: bool = False
    """Whether `Inspection.size` is wanted: a plan needs it, a job does not, and it takes seconds."""


class Fault(Spec):
    """A reason why the model, or the job on it, cannot work. It will not go away by itself."""

    param: str
    """The job's field that has to change, as a dotted path."""
    message: str
    """A complete sentence: what is wrong, where, and how to fix it."""


class LinearSize(Spec):
    """Matrices of the language model that are alike."""

    name: str
    """The last part of their names in the model, which adapters go by."""
    into: int
    out: int
    count: int
    """In all layers together."""


class AdapterSize(Spec):
    """The job's adapter on the model."""

    rank: int
    targets: tuple[str, ...] | None
    parameters: int


class ModelSize(Spec):
    """What planning needs of a model, counted on the model itself."""

    family: str
    parameters: int
    """Of the whole model; shared ones once."""
    frozen: int = 0
    """Parameters outside the language model, which are loaded and never trained."""
    layers: int
    attention_layers: int
    """Layers in which tokens attend to each other; the others are state spaces, convolutions or linear attention."""
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the widest MLP; of one expert in a mixture."""
    vocabulary: int
    tied: bool
    linears: tuple[LinearSize, ...]
    layer_vectors: int
    """Parameters of a layer in the mean outside its matrices and experts: norms, biases, convolutions."""
    experts: int = 0
    experts_a_token: int = 0
    expert_parameters: int = 0
    """Of all layers' experts together."""
    packs: bool = True
    """False where the model is known to be computed padded without trying it."""
    kept_width: float = 0.0
    """Bytes that a layer in the mean keeps of a token for its backward pass, float32; 0 = not known."""
    kept_square: float = 0.0
    """The same of a pair of tokens, where attention keeps its probabilities."""
    adapter: AdapterSize | None = None


class Inspection(Spec):
    model_class: str = ""
    """The class of transformers that computes the model."""
    faults: tuple[Fault, ...] = ()
    """In the order in which they were looked for; any of them refuses the job."""
    size: ModelSize | None = None
    """None where it was not asked for, or the model does not show it."""
    notes: tuple[str, ...] = ()
    """Sentences for the job's events and for `dpo plan`: what was repaired, or is computed in another way."""
