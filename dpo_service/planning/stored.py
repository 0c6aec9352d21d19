"""What the headers of a model's weight files say of its size. Reads no weight, and needs no transformers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dpo_service.errors import ModelRefused
from dpo_service.manifests.inspection import LinearSize
from dpo_service.storage.weights import stored_weights

_IN_A_LAYER = re.compile(r"\.\d+\.")
_EXPERT = re.compile(r"\.experts\.")
NOT_LANGUAGE = re.compile(r"(?:^|\.)(?:vision|visual|image|audio|video|multi_modal|multimodal|mm_|connector|aligner)")
"""How the parts of a model are named that read images and sound, and that pass on what they read."""


@dataclass(frozen=True)
class StoredSize:
    parameters: int
    linears: tuple[LinearSize, ...]
    """Matrices of the layers. Which side is the input is not said: GPT-2's lie the other way."""
    vectors: int
    """Of all layers: what is neither a matrix nor an expert."""
    expert_parameters: int
    frozen: int
    """Outside the language model, by their names."""


def stored_size(directory: Path) -> StoredSize | None:
    """None where the weights are not here."""
    try:
        weights = stored_weights(directory)
    except ModelRefused:
        return None
    matrices: Counter[tuple[str, int, int]] = Counter()
    vectors = experts = frozen = 0
    for name, weight in weights.items():
        if NOT_LANGUAGE.search(name):
            frozen += weight.numbers
        elif not _IN_A_LAYER.search(name):
            continue
        elif _EXPERT.search(name):
            experts += weight.numbers
        elif len(weight.shape) == 2 and name.endswith(".weight"):
            out, into = weight.shape
            matrices[name.removesuffix(".weight").rpartition(".")[2], into, out] += 1
        else:
            vectors += weight.numbers
    total = sum(weight.numbers for weight in weights.values())
    if not total:
        return None
    linears = tuple(LinearSize(name=n, into=i, out=o, count=count) for (n, i, o), count in matrices.items())
    return StoredSize(total, linears, vectors, experts, frozen)
