"""What a served model is asked to be."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dpo_service.specs.base import Spec


class EngineSpec(Spec):
    """The part of vLLM's settings a user may set; the rest is chosen for the device."""

    max_model_len: Annotated[int, Field(ge=16)] | None = None
    """Tokens of prompt plus answer; None = what the model allows."""
    dtype: str = "auto"
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 32
    gpus: Annotated[int, Field(ge=0, le=8)] = 0


class ServeSpec(Spec):
    """A deployment, every value decided."""

    deployment_id: str
    model_id: str
    """The name clients use in `model`; answers carry it."""
    model_path: str
    """A local directory in the Hugging Face layout, readable by the replicas."""
    checkpoint_digest: str | None = None
    engine: EngineSpec = EngineSpec()
