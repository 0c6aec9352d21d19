"""How the policy's own answers are sampled, and by what."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpo_service.specs.base import Spec

Sync = Literal["file", "nccl", "ipc"]
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks vLLM makes room for; an adapter takes the next one up."""


class SamplerSpec(Spec):
    """The engines, every value decided."""

    samplers: Annotated[int, Field(ge=1, le=256)] = 1
    gpus: Annotated[int, Field(ge=0, le=8)] = 0
    """Of one sampler; 0 samples on the CPU."""
    cpus: Annotated[int, Field(ge=1, le=256)] = 1
    """Of one sampler: what it books, and its threads where it samples on the CPU."""
    shares_device: bool = False
    """Trainer and sampler take turns on one GPU: the sampler sleeps while a step trains."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the sampler's weights."""
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 32
    """Answers sampled at once."""
    max_model_len: Annotated[int, Field(ge=16)] | None = None
    """Tokens of prompt plus answer; None = what the model allows."""
    kv_cache_bytes: Annotated[int, Field(ge=1 << 20)] | None = None
    """Of the key-value cache; None = room for `max_num_seqs` answers on the CPU, vLLM's own choice on GPUs."""
    lora_rank: Annotated[int, Field(ge=1, le=512)] | None = None
    """The policy is an adapter of this rank over the unchanged base; None = its whole weights change."""
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 3
    """How often one sampler is started again after it died."""

    @model_validator(mode="after")
    def _shares_what_there_is(self) -> Self:
        if self.shares_device and not self.gpus:
            raise ValueError("shares_device is for a GPU that trainer and sampler share; set gpus, or leave it out")
        return self

    @property
    def booked_gpus(self) -> int:
        """Of all samplers together; those that share the workers' devices book nothing."""
        return 0 if self.shares_device else self.samplers * self.gpus

    @property
    def booked_cpus(self) -> int:
        return 0 if self.shares_device else self.samplers * self.cpus

    @property
    def sync(self) -> Sync:
        """How new weights come: over the device they share, between devices, or as a file: on the CPU, which maps it,
        and adapters, which are files anyway."""
        if not self.gpus or self.lora_rank is not None:
            return "file"
        return "ipc" if self.shares_device else "nccl"


class SamplingSpec(Spec):
    """The answers to each prompt."""

    n: Annotated[int, Field(ge=1, le=64)] = 4
    """Answers to a prompt: two or more where they are compared with each other, one where it is the row's answer."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """0 would give the same answer n times."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=131072)] = 256
    """An answer that reaches it is cut off."""
