"""The samplers' port: prompts as token ids go in, answers as token ids come out, and weights go in from the side.

    trainer ── Weights ──> Sampler.sync        version 8
    prompts ─────────────> Sampler.sample ──> n Samples a prompt: token ids, log-probabilities, finished, version

Nothing is ever decoded and encoded again. No answer mixes two policies: `sync` lets the answers under way end, and
answers that wait for a slot are sampled from the new weights and carry the new version. (vLLM could also freeze answers
and go on with the new weights, which loses no time and makes answers that no policy would give; or abort them.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from dpo_service.specs.sampling import SamplingSpec


@dataclass(frozen=True)
class SamplePrompt:
    token_ids: tuple[int, ...]
    seed: int
    """Answers are a function of it, of the prompt, the weights and the options. As `seed_of` makes it."""


@dataclass(frozen=True)
class Sample:
    """One answer."""

    token_ids: tuple[int, ...]
    """With the end-of-sequence token, where the answer is finished."""
    logps: tuple[float, ...]
    """log p(token | what precedes it) under the policy itself: before temperature and top_p. One a token."""
    finished: bool
    """It ended by itself; False = cut off by the limit of tokens."""
    version: int
    """Of the policy that sampled it, all of it."""

    @property
    def logp(self) -> float:
        """Of the whole answer."""
        return sum(self.logps)


@dataclass(frozen=True)
class Weights:
    """New weights, as files that no one changes any more; or word that they were sent from device to device."""

    version: int
    kind: Literal["full", "adapter", "device"]
    path: str = ""
    """A safetensors file, or of an adapter a directory in peft's layout."""
    digest: str = ""
    """sha256 of the file's bytes; of an adapter's tensors and configuration."""


@dataclass(frozen=True)
class Synced:
    version: int
    seconds: float
    """From the call to the new weights, the wait for answers under way included."""
    paused: float
    """Of these, how long no answer was being sampled."""


@runtime_checkable
class Sampler(Protocol):
    """Anything that samples from the policy. Safe to ask from many tasks of one event loop at once."""

    async def sample(self, prompts: Sequence[SamplePrompt], options: SamplingSpec) -> list[tuple[Sample, ...]]:
        """`options.n` answers to each prompt, in the order of the prompts. Waits for a slot.

        Raises:
            SamplerLost: the sampler has died; another, or it itself once restarted, can be asked again.
            TrainingError: it cannot sample these prompts.
        """
        ...

    async def sync(self, weights: Weights) -> Synced:
        """Sample from `weights` from now on, whatever was cached for the old ones dropped. Those of kind `device` the
        trainer has sent already (`device_transfer`): only whether they are here is looked at.

        Raises:
            WeightsRefused: they are not what they say they are, or not this model's. Nothing has changed.
            SamplerLost: the sampler died of it, or its weights are torn and it has to be restarted; or it was not among
                those that the trainer sent them to.
        """
        ...

    async def version(self) -> int:
        """Of the policy that answers are sampled from now; -1 = its weights are torn, and it samples nothing. A sampler
        that died and was restarted has its first."""
        ...

    async def sleep(self) -> None:
        """Let the answers under way end, and leave the device's memory to the trainer. Without effect on the CPU."""
        ...

    async def wake(self) -> None: ...

    async def close(self) -> None: ...


def seed_of(job_seed: int, step: int, index: int) -> int:
    """The seed of prompt `index` of a step. Far from its neighbours', since answers 2..n take the seeds that follow."""
    digest = hashlib.sha256(f"{job_seed} {step} {index}".encode()).digest()
    return int.from_bytes(digest[:6])
