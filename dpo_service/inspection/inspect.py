"""The inspection itself: each part looks at the model and adds what it finds to the report."""

from __future__ import annotations

from collections.abc import Callable

from dpo_service.errors import DpoServiceError, InvalidSpec
from dpo_service.inspection import adapters, positions, size, stops, tokenizer, weights
from dpo_service.inspection.subject import Subject
from dpo_service.manifests.inspection import Fault, Inspection, InspectionRequest

Part = Callable[[Subject], None]

PARTS: tuple[Part, ...] = (weights.look, adapters.look, positions.look, tokenizer.look, stops.look, size.look)
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
    return Inspection(model_class=name, faults=tuple(subject.faults), size=subject.size, notes=tuple(subject.notes))


def require(report: Inspection) -> None:
    """Raises InvalidSpec with the first fault of `report`, if it has one."""
    if report.faults:
        raise InvalidSpec(report.faults[0].message, param=report.faults[0].param)
