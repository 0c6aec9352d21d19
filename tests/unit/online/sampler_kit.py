"""A tiny policy, its changes as a trainer makes them, and how far a sampler's log-probabilities are from its own."""

from __future__ import annotations

from pathlib import Path

import torch

from dpo_service.online.port import Sample, SamplePrompt, Weights, seed_of
from dpo_service.online.weights import WeightsFolder
from dpo_service.specs.adapter import LoraSpec
from dpo_service.train.batch import collate
from dpo_service.train.logprobs import completion_logps
from dpo_service.train.optim import trained_parameters
from dpo_service.train.policy import add_adapter, base_of, load_model, merged_state
from dpo_service.train.rows import Example

CLOSE = 1e-3
"""Nats a token between sampler and trainer, both in float32."""


class Policy:
    """What a trainer has: weights that change, and a folder to publish them in."""

    def __init__(self, model_dir: Path, folder: WeightsFolder, *, adapter: bool, seed: int = 0) -> None:
        base = load_model(model_dir)
        self.model = add_adapter(base, LoraSpec(rank=4), seed) if adapter else base
        self.folder, self.adapter = folder, adapter
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def train(self) -> None:
        """As far as a long training would move it."""
        for parameter in trained_parameters(self.model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=self._generator))

    def publish(self, version: int, dtype: str = "float32") -> Weights:
        if self.adapter:
            return self.folder.publish_adapter(self.model, trained_parameters(self.model), version)
        return self.folder.publish(self.model, merged_state(self.model), version, dtype)

    @torch.no_grad()
    def gap(self, prompts: list[SamplePrompt], answers: list[tuple[Sample, ...]]) -> float:
        """The largest difference in an answer's log-probability between sampler and trainer, a token."""
        pairs = [(prompt, sample) for prompt, some in zip(prompts, answers, strict=True) for sample in some]
        rows = [Example(prompt=list(prompt.token_ids), chosen=list(sample.token_ids)) for prompt, sample in pairs]
        logps = completion_logps(base_of(self.model), collate(rows)).logps_S.tolist()
        differences = [abs(logp - s.logp) / len(s.token_ids) for logp, (_, s) in zip(logps, pairs, strict=True)]
        return max(differences)


def some_prompts(count: int = 4, *, step: int = 0) -> list[SamplePrompt]:
    """Of several lengths; the last one is longer than a block of vLLM's prefix cache."""
    lengths = [5 + 3 * index for index in range(count - 1)] + [200]
    return [
        SamplePrompt(tuple(6 + (7 * index + place) % 390 for place in range(length)), seed_of(0, step, index))
        for index, length in enumerate(lengths)
    ]
