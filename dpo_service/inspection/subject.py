"""The model under inspection."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_service.manifests.inspection import Fault, InspectionRequest, ModelSize


@dataclass
class Subject:
    """The model under inspection, and what has been found so far."""

    request: InspectionRequest
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    size: ModelSize | None = None

    @property
    def directory(self) -> Path:
        return Path(self.request.directory)

    @cached_property
    def shell(self) -> Any:
        """The model on the meta device: every module and shape, no weights. Where they are here, the weight files'
        headers are held to it. Raises TrainingError and ModelRefused as `load_model`."""
        from dpo_service.train.policy import described_model, empty_model

        return described_model(self.directory) if self.request.weights_here else empty_model(self.directory)
