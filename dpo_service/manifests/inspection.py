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


class Fault(Spec):
    """A reason why the model, or the job on it, cannot work. It will not go away by itself."""

    param: str
    """The job's field that has to change, as a dotted path."""
    message: str
    """A complete sentence: what is wrong, where, and how to fix it."""


class Inspection(Spec):
    model_class: str = ""
    """The class of transformers that computes the model."""
    faults: tuple[Fault, ...] = ()
    """In the order in which they were looked for; any of them refuses the job."""
    notes: tuple[str, ...] = ()
    """Sentences for the job's events and for `dpo plan`: what was repaired, or is computed in another way."""
