"""Log-probabilities of a few fixed sequences under the policy, and a digest of each of its weights as written. Both are
kept beside the files that are published.

    training ── probe.json ──┬─> runner: model/ as transformers loads it gives the same      else the job fails
                             └─> a replica, before it answers: vLLM gives the same           else the deployment fails

So that what was trained, what was published and what is served are one model is looked at, and not assumed. Each save
records its probe, which costs a forward pass over some fifty tokens and, on the thread that writes, a second digest;
only the checkpoint that is published is loaded again, since that takes as long as loading the model.

In half precision log-probabilities alone would let a lost adapter pass: a usual run moves a token's by some hundredths,
which is what rounding does too. The digests have no tolerance, so they find whatever happens between the weights that
training hands over and those that transformers loads. (`train/probe.py` compares the merging of adapters in float32.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from dpo_service.checkpoint.format import MANIFEST, MODEL, read_manifest
from dpo_service.errors import CheckpointError, PublishedModelDiffers
from dpo_service.specs.base import Spec

FILE = "probe.json"
TOLERANCE = {"float32": 1e-4, "half": 0.1}
"""Of the mean log-probability of an answer's tokens. In float32 two ways to compute one model are 1e-6 apart. In half
precision the policy is computed from float32 weights and its files hold rounded ones; tiny models are 0.001 to 0.01
apart then, and one whose head or embedding is not the trained one differs by tenths to whole numbers."""
PROMPT, ANSWERS = 5, (12, 7)
"""The shortest sequence and a token fit the shortest context that can be served, of 16."""
SEQUENCES = 3
SHOWN = 4
"""Names of weights in a message."""


class ProbeSequence(Spec):
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logp: float
    """Sum over the answer's tokens of log p(token | what precedes it)."""


class Probe(Spec):
    arithmetic: Literal["float32", "half"]
    """Of the policy and of its files: the coarser of the two."""
    sequences: tuple[ProbeSequence, ...] = Field(min_length=1)
    weights: dict[str, str] = Field(default_factory=dict)
    """Digests of the weights as they were written, by name. Empty in older checkpoints, and then not compared."""

    def with_logps(self, logps: Sequence[float]) -> Probe:
        """The same sequences under another model, computed in float32."""
        pairs = zip(self.sequences, logps, strict=True)
        sequences = tuple(sequence.model_copy(update={"logp": logp}) for sequence, logp in pairs)
        return self.model_copy(update={"arithmetic": "float32", "sequences": sequences})

    def within(self, length: int) -> Probe | None:
        """The sequences that a context of `length` tokens has room for, and for one more token; None = for none."""
        short = tuple(s for s in self.sequences if len(s.prompt) + len(s.answer) < length)
        return self.model_copy(update={"sequences": short}) if short else None


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
    number, worst = _worst(probe, logps)
    allowed = TOLERANCE["half" if "half" in (probe.arithmetic, arithmetic) else "float32"]
    if worst <= allowed:
        return worst
    sequence = probe.sequences[number]
    raise PublishedModelDiffers(
        f"{what} is not the model that was trained: the mean log-probability of probe answer {number} is "
        f"{logps[number] / len(sequence.answer):.4f}, and that of the policy was "
        f"{sequence.logp / len(sequence.answer):.4f} ({worst:.2g} apart, {allowed:g} allowed)"
    )


def require_same_weights(probe: Probe, digests: Mapping[str, str], logps: Sequence[float], what: str) -> None:
    """Of `what`: `digests` of its weights, and what it gives for the probe.

    Raises:
        PublishedModelDiffers: a weight is not as it was written; the sentence has the names, and how far that goes.
    """
    wrong = sorted(name for name, digest in probe.weights.items() if digests.get(name) != digest)
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise PublishedModelDiffers(
            f"{what} is not the model that was trained: {len(wrong)} of its {len(probe.weights)} weights are not as "
            f"they were written ({', '.join(wrong[:SHOWN])}{more}), and the mean log-probability of a probe answer is "
            f"up to {_worst(probe, logps)[1]:.2g} from the policy's"
        )


def _worst(probe: Probe, logps: Sequence[float]) -> tuple[int, float]:
    """The answer whose mean log-probability differs most, and by how much; what is no number differs most of all."""
    pairs = zip(probe.sequences, logps, strict=True)
    differences = [abs(sequence.logp - logp) / len(sequence.answer) for sequence, logp in pairs]
    number = max(range(len(differences)), key=lambda n: math.inf if math.isnan(differences[n]) else differences[n])
    return number, differences[number]


def read_probe(model_dir: Path) -> Probe | None:
    """That of the checkpoint whose `model/` this is; None where there is none (a base model, an older checkpoint).

    Raises:
        CheckpointError: it is not as it was written.
    """
    checkpoint = model_dir.parent
    file = checkpoint / FILE
    if model_dir.name != MODEL or not file.is_file() or not (checkpoint / MANIFEST).is_file():
        return None
    content = file.read_bytes()
    written = {entry.path: entry.sha256 for entry in read_manifest(checkpoint).files}
    if written.get(FILE) != hashlib.sha256(content).hexdigest():
        raise CheckpointError(f"{checkpoint.name}/{FILE} is not what was written: its digest differs")
    return Probe.model_validate_json(content)
