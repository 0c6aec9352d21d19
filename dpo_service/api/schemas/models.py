"""Models on the wire (OpenAI's Model object, plus where it comes from)."""

from __future__ import annotations

from typing import Literal

from dpo_service.api.schemas.common import Wire


class ModelObject(Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    # ours
    base: str | None = None
    """The model it was trained from; None for the user's own."""
    job_id: str | None = None
    step: int | None = None
    """Set for a checkpoint."""
    digest: str | None = None
    deployment: str | None = None
    """State of the deployment that serves it; None = not served."""


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[ModelObject]
    has_more: bool = False
