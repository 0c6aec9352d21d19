"""What a served model is asked to be."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dpo_service.specs.base import Spec

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class EngineRequest(Spec):
    """The part of vLLM's settings a user may set; the rest is chosen for the device."""

    max_model_len: Annotated[int, Field(ge=16)] | None = None
    """Tokens of prompt plus answer; None = what the model allows."""
    dtype: Dtype = "auto"
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 32
    gpus: Annotated[int, Field(ge=0, le=8)] | None = None
    """None = one where the cluster has GPUs, else none."""

    def decided(self, cluster_gpus: float) -> EngineSpec:
        gpus = self.gpus if self.gpus is not None else int(cluster_gpus >= 1)
        return EngineSpec.model_validate(self.model_dump() | {"gpus": gpus})


class EngineSpec(Spec):
    """EngineRequest, every value decided."""

    max_model_len: Annotated[int, Field(ge=16)] | None = None
    dtype: Dtype = "auto"
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 32
    gpus: Annotated[int, Field(ge=0, le=8)] = 0


class ServeSpec(Spec):
    """A deployment, every value decided."""

    deployment_id: str
    model_id: str
    """The name clients use in `model`; answers carry it."""
    model_path: str
    """An absolute path to a directory in the Hugging Face layout, readable by the replicas; or a hub id."""
    checkpoint_digest: str | None = None
    engine: EngineSpec = EngineSpec()
