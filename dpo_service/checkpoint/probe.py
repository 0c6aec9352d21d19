"""Log-probabilities of a few fixed sequences under the policy, kept beside the files that are published.

    training ── probe.json ──┬─> runner: model/ as transformers loads it gives the same      else the job fails
                             └─> a replica, before it answers: vLLM gives the same           else the deployment fails

So that what was trained, what was published and what is served are one model is looked at, and not assumed. Each save
records its probe, which costs a forward pass over some sixty tokens; only the checkpoint that is published is loaded
again, since that takes as long as loading the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from dpo_service.errors import PublishedModelDiffers
from dpo_service.specs.base import Spec

FILE = "probe.json"
TOLERANCE = {"float32": 1e-4, "half": 0.1}
"""Of the mean log-probability of an answer's tokens. In float32 two ways to compute one model are 1e-6 apart. In half
precision the policy is computed from float32 weights and its files hold rounded ones; tiny models are 0.001 to 0.01
apart then, and one whose head or embedding is not the trained one differs by tenths to whole numbers."""
PROMPT, ANSWERS = 9, (12, 7)
SEQUENCES = 3


class ProbeSequence(Spec):
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logp: float
    """Sum over the answer's tokens of log p(token | what precedes it)."""


class Probe(Spec):
    arithmetic: Literal["float32", "half"]
    """Of the policy and of its files: the coarser of the two."""
    sequences: tuple[ProbeSequence, ...] = Field(min_length=1)


def probe_ids(vocabulary: int, eos: int | None) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts with two answers each, the same for every model of this vocabulary. High ids, which may stand for images
    and their like, are left out."""
    rng = np.random.default_rng(0)
    ids = [
        (_ids(rng, vocabulary, PROMPT + number), [_ids(rng, vocabulary, length + number) for length in ANSWERS])
        for number in range(SEQUENCES)
    ]
    if eos is not None and 0 <= eos < vocabulary:
        for _, answers in ids:
            answers[0][-1] = eos
    return ids


def _ids(rng: np.random.Generator, vocabulary: int, length: int) -> list[int]:
    return [int(number) for number in rng.integers(0, min(vocabulary, 30_000), length)]


def require_same(probe: Probe, logps: Sequence[float], what: str, *, arithmetic: str = "float32") -> float:
    """The largest difference of an answer's mean log-probability; `what` computed `logps`, in `arithmetic`.

    Raises:
        PublishedModelDiffers: it is more than that arithmetic explains.
    """
    pairs = zip(probe.sequences, logps, strict=True)
    differences = [abs(sequence.logp - logp) / len(sequence.answer) for sequence, logp in pairs]
    allowed = TOLERANCE["half" if "half" in (probe.arithmetic, arithmetic) else "float32"]
    worst = max(differences, key=lambda difference: difference if difference == difference else float("inf"))
    if worst <= allowed:
        return worst
    number = differences.index(worst) if worst in differences else 0
    raise PublishedModelDiffers(
        f"{what} is not the model that was trained: the mean log-probability of probe answer {number} is "
        f"{logps[number] / len(probe.sequences[number].answer):.4f}, and that of the policy was "
        f"{probe.sequences[number].logp / len(probe.sequences[number].answer):.4f} "
        f"({worst:.2g} apart, {allowed:g} allowed)"
    )


def read_probe(model_dir: Path) -> Probe | None:
    """That of the checkpoint whose `model/` this is; None where there is none (a base model, an older checkpoint)."""
    file = model_dir.parent / FILE
    return Probe.model_validate_json(file.read_bytes()) if file.is_file() else None
