"""The layers that a job's adapter is put on."""

from __future__ import annotations

from dpo_service.inspection.subject import Subject


def look(subject: Subject) -> None:
    """Raises InvalidSpec where the job names layers that are not there or can have no adapter."""
    from dpo_service.train.adapters import adapted_layers, target_modules

    spec = subject.request.lora
    if spec is None:
        return
    names = target_modules(subject.shell, spec)
    subject.notes.append(
        f"The adapter of rank {spec.rank} is on {adapted_layers(subject.shell, names)} layers: {', '.join(names)}"
    )
