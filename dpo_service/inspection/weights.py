"""What a job should know of the weight files, where they are read otherwise than as they are."""

from __future__ import annotations

import json

from dpo_service.inspection.subject import Subject
from dpo_service.storage.weights import quantised_as, renaming, stored_weights
from dpo_service.train.pretrained import HEAD, has_own_head


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
    config = subject.shell.config
    tied = any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))
    if tied and has_own_head(subject.directory):
        subject.notes.append(
            "config.json says that output head and embedding are one (tie_word_embeddings), and the files hold a head "
            f"of its own ({HEAD}); that head is used, as transformers does, and the result is published as untied"
        )
    method = quantised_as(json.loads((subject.directory / "config.json").read_text()))
    if method is not None:
        subject.notes.append(
            f"The model's weights are quantised ({method}); they are turned back into numbers when they are read, and "
            "the result is published as numbers"
        )
