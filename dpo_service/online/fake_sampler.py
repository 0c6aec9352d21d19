"""The fake sampler: transformers in this process, an answer at a time. Slow, exact, and without vLLM."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dpo_service.errors import SamplerLost
from dpo_service.online.gate import Gate
from dpo_service.online.port import Sample, SamplePrompt, Synced, Weights
from dpo_service.online.weights import check, model_shapes
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from dpo_service.train.policy import load_adapter, load_model


class FakeSampler:
    """A Sampler. `kill` makes it behave as one that died, `restart` as Ray's restart of it."""

    def __init__(self, spec: SamplerSpec, model_dir: Path, version: int) -> None:
        self._spec, self._model_dir, self._first = spec, model_dir, version
        self._shapes = model_shapes(model_dir)
        self._gate = Gate(spec.max_num_seqs)
        self.restart()

    def kill(self) -> None:
        self._dead = True

    def restart(self) -> None:
        self._dead, self._version = False, self._first
        self._model: Any = load_model(self._model_dir)
        self._end = self._model.generation_config.eos_token_id

    async def version(self) -> int:
        self._alive()
        return self._version

    async def sample(self, prompts: Sequence[SamplePrompt], options: SamplingSpec) -> list[tuple[Sample, ...]]:
        return [await self._answers(prompt, options) for prompt in prompts]

    async def _answers(self, prompt: SamplePrompt, options: SamplingSpec) -> tuple[Sample, ...]:
        async with self._gate.inside(options.n):
            answers = []
            for answer in range(options.n):
                await asyncio.sleep(0)  # others come between two answers, as they do at an engine
                self._alive()
                answers.append(self._answer(list(prompt.token_ids), prompt.seed + answer, options))
            return tuple(answers)

    @torch.no_grad()
    def _answer(self, ids: list[int], seed: int, options: SamplingSpec) -> Sample:
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        logps: list[float] = []
        while len(tokens) < options.max_tokens and (not tokens or tokens[-1] != self._end):
            logits_V = self._model(torch.tensor([ids + tokens]), use_cache=False).logits[0, -1].float()
            shares_V = _nucleus((logits_V / options.temperature).softmax(-1), options.top_p)
            tokens.append(int(torch.multinomial(shares_V, 1, generator=generator)))
            logps.append(float(logits_V.log_softmax(-1)[tokens[-1]]))
        return Sample(tuple(tokens), tuple(logps), tokens[-1] == self._end, self._version)

    async def sync(self, weights: Weights) -> Synced:
        started = time.monotonic()
        self._alive()
        check(weights, self._shapes, self._spec.dtype)
        async with self._gate.closed():
            paused = time.monotonic()
            self._load(weights)
            self._version = weights.version
        done = time.monotonic()
        return Synced(weights.version, done - started, done - paused)

    def _load(self, weights: Weights) -> None:
        if weights.kind == "adapter":
            self._model = load_adapter(load_model(self._model_dir), Path(weights.path))
        else:
            self._model.load_state_dict(load_file(weights.path), strict=False)

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def close(self) -> None:
        self._dead = True

    def _alive(self) -> None:
        if self._dead:
            raise SamplerLost("the fake sampler is dead")


def _nucleus(shares_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of likeliest tokens whose shares reach `top_p` (arXiv:1904.09751)."""
    sorted_V, order_V = shares_V.sort(descending=True)
    kept_V = sorted_V.cumsum(-1) - sorted_V < top_p
    return torch.zeros_like(shares_V).scatter(-1, order_V, sorted_V * kept_V)
