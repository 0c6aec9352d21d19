"""Computing the probe of `checkpoint/probe.py`: by the policy as it is trained, and by its files as transformers loads
them.

The two share nothing but the weights: the policy's way is the training step's (packed rows, our attention and head),
the other is a plain forward pass over one sequence.

Shapes: S sequences, L their length, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch

from dpo_service.checkpoint.format import ADAPTER
from dpo_service.checkpoint.probe import (
    Probe,
    ProbeSequence,
    probe_ids,
    read_probe,
    require_same,
    require_same_weights,
)
from dpo_service.checkpoint.state import digest_each
from dpo_service.storage.weights import stored_weights, weight_files
from dpo_service.train.batch import collate
from dpo_service.train.logprobs import completion_logps
from dpo_service.train.policy import autocast, base_of, load_adapter, load_model, merge, plain_model
from dpo_service.train.rows import Example

ROOM = 1.3
"""Memory that a model takes while it is loaded, by the size of its files."""


@torch.no_grad()
def take_probe(policy: Any, precision: str, device: torch.device) -> Probe:
    """The policy's own values. Of a sharded model every rank must ask."""
    model = base_of(policy)
    config = model.config.get_text_config()
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    ids = probe_ids(config.vocab_size, eos)
    examples = [Example(prompt=prompt, chosen=answers[0], rejected=answers[1]) for prompt, answers in ids]
    with autocast(device, precision):
        logps_S = completion_logps(model, collate(examples).to(device)).logps_S
    texts = [(prompt, answers[which]) for which in range(2) for prompt, answers in ids]
    exact = precision == "float32" and device.type == "cpu"
    return Probe(
        arithmetic="float32" if exact else "half",
        sequences=tuple(
            ProbeSequence(prompt=tuple(prompt), answer=tuple(answer), logp=logp)
            for (prompt, answer), logp in zip(texts, logps_S.tolist(), strict=True)
        ),
    )


@torch.no_grad()
def plain_logps(model: Any, probe: Probe) -> list[float]:
    """The same sequences by a plain forward pass each."""
    values = []
    for sequence in probe.sequences:
        ids_L = torch.tensor([*sequence.prompt, *sequence.answer])
        logps_LV = model(input_ids=ids_L[None], use_cache=False).logits[0].float().log_softmax(-1)
        start = len(sequence.prompt)
        values.append(float(logps_LV[start - 1 : -1].gather(1, ids_L[start:, None]).sum()))
    return values


def verify_published(model_dir: Path, adapted: Path | None = None) -> str:
    """A sentence on how the files in `model_dir`, as transformers loads them on the CPU, compare with the policy.

    The policy was the model in `adapted` under an adapter, if that is given: where log-probabilities are of half
    precision, which a lost adapter can hide in, merging it is done again in float32. One model is in memory at a time.

    Raises:
        PublishedModelDiffers: they have other weights, or give other log-probabilities.
        ModelRefused: they are not loaded at all.
    """
    probe = read_probe(model_dir)
    if probe is None:
        return "The published files were not compared with the policy: their checkpoint has no probe"
    size = sum(file.stat().st_size for file in weight_files(model_dir))
    if lacking := _lacking(size):
        return f"The published files were not compared with the policy: {lacking}"
    worst, half = _verify_files(model_dir, probe)
    sentence = f"The published files give the policy's log-probabilities (within {worst:.1g} a token)"
    if adapted is None or not half:
        return sentence
    if lacking := _lacking(4 * sum(weight.numbers for weight in stored_weights(adapted).values())):
        return f"{sentence}; merging the adapter was not done again in float32: {lacking}"
    worst = _verify_merging(adapted, model_dir.parent / ADAPTER, probe)
    return f"{sentence}, and so does merging the adapter in float32 (within {worst:.1g})"


def _lacking(size: int) -> str | None:
    """What keeps a model of `size` bytes from being loaded."""
    needed, free = ROOM * size / 2**30, psutil.virtual_memory().available / 2**30
    return f"that takes {needed:.1f} GiB of memory, and {free:.1f} GiB are free" if needed > free else None


def _verify_files(model_dir: Path, probe: Probe) -> tuple[float, bool]:
    """The largest difference, and whether it is one of half precision."""
    what = "the published checkpoint"
    model = plain_model(model_dir, dtype="auto")
    half = "half" if model.dtype != torch.float32 else "float32"
    logps = plain_logps(model, probe)
    require_same_weights(probe, digest_each(model.state_dict()), logps, what)
    return require_same(probe, logps, what, arithmetic=half), "half" in (half, probe.arithmetic)


def _verify_merging(base_dir: Path, adapter: Path, probe: Probe) -> float:
    policy = load_adapter(load_model(base_dir), adapter)
    beside = probe.with_logps(plain_logps(policy, probe))
    merge(policy)
    return require_same(beside, plain_logps(policy, probe), "the model with its adapter merged in")
