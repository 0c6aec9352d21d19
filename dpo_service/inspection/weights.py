"""What a job should know of the weight files, where they are read otherwise than as they are."""

from __future__ import annotations

import json

from dpo_service.inspection.subject import Subject
from dpo_service.storage.weights import quantised_as, renaming, stored_weights


def look(subject: Subject) -> None:
    """Notes for files that are read under other names, or in another type. That all weights are there is for
    `Subject.shell` to find."""
    if not subject.request.weights_here:
        return
    stored = stored_weights(subject.directory)
    if renaming(stored):
        subject.notes.append(
            f"The names of the model's weights have the prefix of a wrapper ({next(iter(stored))}); they are read, and "
            "the result is published, without it"
        )
    method = quantised_as(json.loads((subject.directory / "config.json").read_text()))
    if method is not None:
        subject.notes.append(
            f"The model's weights are quantised ({method}); they are turned back into numbers when they are read, and "
            "the result is published as numbers"
        )
