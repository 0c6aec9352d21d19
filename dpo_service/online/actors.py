"""Samplers as Ray actors: one process each, restarted when they die, placed where the job says.

    RaySampler (the loop) ──> SamplerActor (its process) ──> VllmSampler ──> vLLM

A restarted actor loads the weights it was made with and says so by its version; the pool pushes the newest. Nothing
outlives the job: the actors are its own, and `close` ends them.

A sampler with devices of its own books them, in a bundle of a placement group. One that shares a worker's device books
nothing, since the worker has booked it whole: it is put on the worker's machine, and told the device (`Place`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from dpo_service.errors import DpoServiceError, SamplerLost, TrainingError
from dpo_service.online.engine import environment
from dpo_service.online.pool import Member, SamplerPool
from dpo_service.online.port import Sample, SamplePrompt, Synced, Weights
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec

T = TypeVar("T")
CALLS_AT_ONCE = 64
CLOSING_S = 10.0
"""A sampler that does not end by itself within it is ended by force."""


@dataclass(frozen=True)
class Place:
    """Where a worker of the trainer computes."""

    node: str
    """Ray's id of its machine."""
    gpu: str
    """Its device there, as CUDA_VISIBLE_DEVICES names it."""


def this_place() -> Place:
    """Of the Ray worker that asks, which has booked a GPU."""
    context = ray.get_runtime_context()
    return Place(context.get_node_id(), str(context.get_accelerator_ids()["GPU"][0]))


class SamplerActor:
    """The process of a sampler."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, spec: str, model_dir: str, version: int, device: str | None = None
    ) -> None:
        """`spec` is a SamplerSpec as JSON; `device` is one that it has not booked. Ray calls it again with the same
        when it restarts the actor."""
        from dpo_service.serve import scratch
        from dpo_service.telemetry import log

        if device is not None:  # before torch looks, and for the engine's own process
            os.environ["CUDA_VISIBLE_DEVICES"] = device
        scratch.use_own()
        log.quiet()
        from dpo_service.online.vllm_sampler import VllmSampler

        self._sampler = await VllmSampler.start(SamplerSpec.model_validate_json(spec), Path(model_dir), version)
        self._group = ""

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
    async def version(self) -> int:
        """Asked of an actor that is being restarted, it waits for it."""
        return await self._sampler.version()

    async def sample(self, prompts: Sequence[SamplePrompt], options: SamplingSpec) -> list[tuple[Sample, ...]]:
        return await self._sampler.sample(prompts, options)

    async def sync(self, weights: Weights) -> Synced:
        return await self._sampler.sync(weights)

    async def check_tensors(self, shapes: Mapping[str, Sequence[int]]) -> None:
        await self._sampler.check_tensors(shapes)

    async def group(self) -> str:
        """That it receives weights in; none since it was started is ''."""
        return self._group

    async def join_group(self, init_info: dict[str, Any], group: str) -> None:
        await self._sampler.init_weight_transfer_engine(init_info)
        self._group = group

    async def start_weight_update(self) -> None:
        await self._sampler.start_weight_update()

    async def update_weights(self, update_info: Any) -> None:
        await self._sampler.update_weights(update_info)

    async def finish_weight_update(self, version: int) -> None:
        await self._sampler.finish_weight_update(version)

    async def sleep(self) -> None:
        await self._sampler.sleep()

    async def wake(self) -> None:
        await self._sampler.wake()

    async def close(self) -> None:
        from dpo_service.serve import scratch

        await self._sampler.close()
        scratch.remove_own()


class RaySampler:
    """A Sampler whose engine is in an actor."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def call(self, method: str, *arguments: Any) -> Any:
        """The actor's `method`.

        Raises:
            SamplerLost: the actor has died, or died meanwhile.
            DpoServiceError: as the method raised it.
        """
        try:
            return await getattr(self.handle, method).remote(*arguments)
        except RayActorError as error:
            raise SamplerLost(f"a sampler's process has died: {_why(error)}") from error
        except RayTaskError as error:
            if isinstance(error.cause, DpoServiceError):
                raise error.cause from error
            raise TrainingError(f"a sampler failed: {error.cause!r}") from error

    async def sample(self, prompts: Sequence[SamplePrompt], options: SamplingSpec) -> list[tuple[Sample, ...]]:
        answers: list[tuple[Sample, ...]] = await self.call("sample", prompts, options)
        return answers

    async def sync(self, weights: Weights) -> Synced:
        synced: Synced = await self.call("sync", weights)
        return synced

    async def version(self) -> int:
        return int(await self.call("version"))

    async def sleep(self) -> None:
        await self.call("sleep")

    async def wake(self) -> None:
        await self.call("wake")

    async def close(self) -> None:
        """End the actor, whatever it does, so that Ray does not restart it."""
        try:
            async with asyncio.timeout(CLOSING_S):
                await self.call("close")
        except (TimeoutError, TrainingError):
            pass
        ray.kill(self.handle, no_restart=True)


def _why(error: RayActorError) -> str:
    """The last line of what its constructor raised, or the first of what Ray says of a process that was ended."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if error.actor_init_failed else 0].strip()


def start_actor(
    spec: SamplerSpec,
    model_dir: Path,
    version: int,
    *,
    placement: Any = None,
    bundle: int = -1,
    beside: Place | None = None,
) -> RaySampler:
    """A sampler in an actor, placed in `bundle` of the placement group `placement`, or on the device of the worker at
    `beside`. Returns before it has loaded."""
    options = {
        "max_restarts": spec.max_restarts,
        "max_concurrency": CALLS_AT_ONCE,
        "runtime_env": {"env_vars": environment(spec)},
        **(_in_bundle(spec, placement, bundle) if beside is None else _at(beside)),
    }
    device = None if beside is None else beside.gpu
    handle = ray.remote(**options)(SamplerActor).remote(spec.model_dump_json(), str(model_dir), version, device)
    return RaySampler(handle)


def _in_bundle(spec: SamplerSpec, placement: Any, bundle: int) -> dict[str, Any]:
    strategy = PlacementGroupSchedulingStrategy(placement, bundle) if placement is not None else "DEFAULT"
    return {"num_cpus": spec.cpus, "num_gpus": spec.gpus, "scheduling_strategy": strategy}


def _at(place: Place) -> dict[str, Any]:
    return {
        "num_cpus": 0,
        "num_gpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=place.node, soft=False),
    }


async def start_pool(
    spec: SamplerSpec,
    model_dir: Path,
    version: int,
    *,
    n: int,
    placement: Any = None,
    bundles: Sequence[int] = (),
    beside: Sequence[Place] = (),
) -> SamplerPool:
    """`spec.samplers` samplers of the model in `model_dir`, loaded and ready for prompts of `n` answers each.

    `bundles` are their places in `placement`, one each; without them Ray chooses. Samplers that share devices are put
    `beside` the workers.

    Raises:
        TrainingError: one of them cannot load the model. None is left behind.
    """
    if beside:
        samplers = [start_actor(spec, model_dir, version, beside=place) for place in beside]
    else:
        places = bundles or (-1,) * spec.samplers
        samplers = [start_actor(spec, model_dir, version, placement=placement, bundle=place) for place in places]
    try:
        versions = await asyncio.gather(*(sampler.version() for sampler in samplers))
    except BaseException:
        for sampler in samplers:
            ray.kill(sampler.handle, no_restart=True)
        raise
    members = [Member(sampler, found, _restarted(sampler)) for sampler, found in zip(samplers, versions, strict=True)]
    return SamplerPool(members, chunk=max(1, spec.max_num_seqs // n))


def _restarted(sampler: RaySampler) -> Any:
    async def wait() -> None:
        await sampler.version()

    return wait


def bundles(spec: SamplerSpec) -> list[dict[str, float]]:
    """What the samplers take, as bundles of a placement group; those that share devices take none."""
    if spec.shares_device:
        return []
    gpus = {"GPU": float(spec.gpus)} if spec.gpus else {}
    return [{"CPU": float(spec.cpus), **gpus} for _ in range(spec.samplers)]
