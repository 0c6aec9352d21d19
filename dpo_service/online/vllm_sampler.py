"""The sampler: vLLM's AsyncLLM, driven by token ids.

    sample ── Gate: slots ──> AsyncLLM ──> token ids, log-probabilities
    sync   ── check the files ── Gate: closed, answers under way end ── vLLM's weight transfer, or another adapter ──
              caches dropped ── Gate: open

On the CPU the engine's core is on a thread of this process (`serve/inprocess.py`); on GPUs it is vLLM's own process.
Whole weights come over vLLM's weight transfer: `file_transfer` on the CPU; NCCL or CUDA IPC on GPUs, and then a trainer
drives the four `..._weight_...` methods (`device_transfer.py`). An adapter is loaded beside the base, which stays as it
is.

On a device that trainer and sampler share, in the order of a step:

    curator   wake: what still sleeps ── the step's answers and verdicts ── sleep: weights to the host, cache dropped
    trainer   trains the step, then gives what it has cached back to the device
    start_weight_update   the weights wake, alone: an update of sleeping weights kills the engine
    finish_weight_update  version set; the cache sleeps on until the curator wakes it
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeVar

from dpo_service.errors import SamplerLost, TrainingError, WeightsRefused
from dpo_service.online.engine import engine_options
from dpo_service.online.gate import Gate
from dpo_service.online.port import Sample, SamplePrompt, Synced, Weights
from dpo_service.online.together import all_of
from dpo_service.online.weights import check, check_shapes, model_shapes
from dpo_service.serve import inprocess
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec

T = TypeVar("T")
SEEDS = 1 << 62
TORN = -1
WEIGHTS, CACHE = "weights", "kv_cache"
"""What of an engine sleeps, by vLLM's names."""


class VllmSampler:
    """A Sampler. Made by `start`, in the event loop that uses it."""

    def __init__(self, engine: Any, spec: SamplerSpec, model_dir: Path, version: int) -> None:
        self._engine = engine
        self._spec = spec
        self._shapes = model_shapes(model_dir)
        self._version = version
        # Twice the engine's own number: a prompt holds its slots until the last of its answers has ended, and the
        # engine is to have someone to go on with.
        self._gate = Gate(2 * spec.max_num_seqs)
        self._adapter: Any = None
        self._torn: str | None = None
        self._held = AsyncExitStack()
        self._asleep: set[str] = set()
        self._names = count()

    @classmethod
    async def start(cls, spec: SamplerSpec, model_dir: Path, version: int) -> Self:
        """Load the model of `model_dir`, whose weights are the policy's `version` (with an adapter: the base's)."""
        options = engine_options(spec, model_dir)  # a model that is not there is told before vLLM is imported
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(**options)
        engine = AsyncLLM.from_engine_args(arguments) if spec.gpus else inprocess.async_llm(arguments)
        sampler = cls(engine, spec, model_dir, version)
        await engine.update_weight_version(str(version))
        if spec.lora_rank is None and spec.sync == "file":
            await sampler.init_weight_transfer_engine({})
        return sampler

    async def version(self) -> int:
        return self._version if self._torn is None else TORN

    # Sampling

    async def sample(self, prompts: Sequence[SamplePrompt], options: SamplingSpec) -> list[tuple[Sample, ...]]:
        return await all_of(self._answers(prompt, options) for prompt in prompts)

    async def _answers(self, prompt: SamplePrompt, options: SamplingSpec) -> tuple[Sample, ...]:
        async with self._gate.inside(options.n):
            if self._torn is not None:
                raise SamplerLost(f"the sampler's weights are torn: {self._torn}")
            version = self._version
            output = await self._generate(prompt, options)
        return tuple(_sample(answer, version) for answer in output.outputs)

    async def _generate(self, prompt: SamplePrompt, options: SamplingSpec) -> Any:
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        tokens = TokensPrompt(prompt_token_ids=list(prompt.token_ids))
        name = f"{next(self._names)}"
        asked = self._engine.generate(tokens, sampling_parameters(prompt, options), name, lora_request=self._adapter)
        try:
            return [output async for output in asked][-1]
        except EngineDeadError as error:
            raise SamplerLost(f"the engine died: {error}") from error
        except Exception as error:
            raise TrainingError(f"vLLM cannot sample this prompt: {_root_cause(error)}") from error

    # New weights

    async def sync(self, weights: Weights) -> Synced:
        started = time.monotonic()
        if weights.kind != self._kind:
            raise WeightsRefused(f"this sampler takes no {weights.kind} weights")
        if weights.kind == "device":
            return await self._sent(weights.version)
        await asyncio.to_thread(check, weights, self._shapes, self._spec.dtype)
        if weights.kind == "adapter":
            paused = await self._load_adapter(weights)
        else:
            await self.start_weight_update()
            paused = time.monotonic()
            await self.update_weights({"path": weights.path})
            await self.finish_weight_update(weights.version)
        done = time.monotonic()
        return Synced(self._version, done - started, done - paused)

    @property
    def _kind(self) -> str:
        """Of the weights that it takes."""
        if self._spec.lora_rank is not None:
            return "adapter"
        return "full" if self._spec.sync == "file" else "device"

    async def _sent(self, version: int) -> Synced:
        """Whether the trainer has sent `version`: a sampler that was restarted has missed it."""
        here = await self.version()
        if here != version:
            raise SamplerLost(f"it has version {here}, and version {version} was sent while it was away")
        return Synced(version, 0.0, 0.0)

    async def _load_adapter(self, weights: Weights) -> float:
        """The new adapter first, so that a failure leaves the old one in use."""
        from vllm.lora.request import LoRARequest

        async with self._gate.closed():
            paused, old = time.monotonic(), self._adapter
            number = 1 if old is None else old.lora_int_id + 1
            new = LoRARequest(f"version-{weights.version}-{number}", number, weights.path)
            try:
                await self._engine.add_lora(new)
            except Exception as error:
                raise WeightsRefused(f"vLLM cannot load version {weights.version}: {_root_cause(error)}") from error
            self._adapter = new
            if old is not None:
                await self._engine.remove_lora(old.lora_int_id)
            await self._engine.update_weight_version(str(weights.version))
            await self._engine.reset_prefix_cache()
            self._version = weights.version
        return paused

    async def check_tensors(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Whether a trainer's tensors are this model's; asked before it starts to send them.

        Raises:
            WeightsRefused: they are not.
        """
        try:
            check_shapes({name: tuple(shape) for name, shape in shapes.items()}, self._shapes)
        except ValueError as error:
            raise WeightsRefused(f"the trainer's weights are refused: {error}") from error

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Make the engine ready to be sent weights; called again, it meets the trainer anew."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def start_weight_update(self) -> None:
        """Let the answers under way end and start none until `finish_weight_update`. What fails from here on leaves
        torn weights, which answer nothing until an update has succeeded."""
        await self._held.enter_async_context(self._gate.closed())

        async def start() -> None:
            await self._wake(WEIGHTS)
            await self._engine.start_weight_update()

        await self._updating(start())

    async def update_weights(self, update_info: Any) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._updating(self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info)))

    async def finish_weight_update(self, version: int) -> None:
        async def finish() -> None:
            await self._engine.finish_weight_update(str(version))
            await self._engine.reset_prefix_cache()

        await self._updating(finish())
        self._version, self._torn = version, None
        await self._held.aclose()

    async def _updating(self, step: Coroutine[Any, Any, None]) -> None:
        try:
            await step
        except BaseException as error:
            self._torn = str(_root_cause(error))
            await self._held.aclose()
            raise SamplerLost(f"new weights failed to load: {self._torn}") from error

    # A device for two

    async def sleep(self) -> None:
        if not self._spec.shares_device:
            return
        async with self._gate.closed():
            if not self._asleep:
                # Level 1 keeps the weights, in the host's memory: not every step's end brings new ones.
                await self._engine.sleep(level=1)
                self._asleep = {WEIGHTS, CACHE}

    async def wake(self) -> None:
        await self._wake(WEIGHTS, CACHE)

    async def _wake(self, *parts: str) -> None:
        """Those of `parts` that sleep."""
        asleep = [part for part in parts if part in self._asleep]
        if asleep:
            await self._engine.wake_up(asleep)
            self._asleep -= set(asleep)

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.shutdown)


def sampling_parameters(prompt: SamplePrompt, options: SamplingSpec) -> Any:
    """vLLM's SamplingParams: nothing is decoded, and only whole answers come back."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=options.n,
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        seed=prompt.seed % SEEDS,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sample(answer: Any, version: int) -> Sample:
    if answer.finish_reason not in ("stop", "length"):
        raise SamplerLost(f"the engine ended an answer early: {answer.finish_reason}")
    logps = answer.logprobs
    return Sample(
        token_ids=tuple(answer.token_ids),
        # The sampled token's comes first at each position.
        logps=tuple(logps.logprobs[start] for start in logps.start_indices),
        finished=answer.finish_reason == "stop",
        version=version,
    )


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
