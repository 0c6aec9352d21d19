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

from dpo_service.checkpoint.probe import Probe, ProbeSequence, probe_ids, read_probe, require_same
from dpo_service.storage.weights import weight_files
from dpo_service.train.batch import collate
from dpo_service.train.logprobs import completion_logps
from dpo_service.train.policy import autocast, base_of, plain_model
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


def verify_published(model_dir: Path) -> str:
    """A sentence on how the files in `model_dir`, as transformers loads them on the CPU, compare with the policy.

    Raises:
        PublishedModelDiffers: they give other log-probabilities.
        ModelRefused: they are not loaded at all.
    """
    probe = read_probe(model_dir)
    if probe is None:
        return "The published files were not compared with the policy: their checkpoint has no probe"
    needed = ROOM * sum(file.stat().st_size for file in weight_files(model_dir))
    if needed > psutil.virtual_memory().available:
        return (
            f"The published files were not compared with the policy: that takes {needed / 2**30:.1f} GiB of memory, "
            f"and {psutil.virtual_memory().available / 2**30:.1f} GiB are free"
        )
    model = plain_model(model_dir, dtype="auto")
    half = model.dtype != torch.float32
    worst = require_same(
        probe, plain_logps(model, probe), "the published checkpoint", arithmetic="half" if half else "float32"
    )
    return f"The published files give the policy's log-probabilities (within {worst:.1g} a token)"
