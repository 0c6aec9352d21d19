"""The inspection itself: each part looks at the model and adds what it finds to the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_service.errors import DpoServiceError, InvalidSpec
from dpo_service.manifests.inspection import Fault, Inspection, InspectionRequest


@dataclass
class Subject:
    """The model under inspection, and what has been found so far."""

    request: InspectionRequest
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        return Path(self.request.directory)

    @cached_property
    def shell(self) -> Any:
        """The model on the meta device: every module and shape, no weights. Raises TrainingError as `load_model`."""
        from dpo_service.train.policy import empty_model

        return empty_model(self.directory)


Part = Callable[[Subject], None]

PARTS: tuple[Part, ...] = ()
"""In this order. A part that raises a DpoServiceError ends the inspection with that fault."""


def inspect(request: InspectionRequest) -> Inspection:
    """Look at the model of `request`; everything that refuses a job is in the report, nothing is raised for it."""
    subject = Subject(request)
    try:
        name = type(subject.shell).__name__
        for part in PARTS:
            part(subject)
    except DpoServiceError as error:
        subject.faults.append(Fault(param=error.param or "model", message=error.message))
        name = ""
    return Inspection(model_class=name, faults=tuple(subject.faults), notes=tuple(subject.notes))


def require(report: Inspection) -> None:
    """Raises InvalidSpec with the first fault of `report`, if it has one."""
    if report.faults:
        raise InvalidSpec(report.faults[0].message, param=report.faults[0].param)
