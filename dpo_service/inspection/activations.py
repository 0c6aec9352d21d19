"""What a model's layers keep for the backward pass, by running it on the meta device: shapes without numbers.

Three lengths give the two coefficients: bytes = fixed + width * tokens + square * tokens^2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dpo_service.train.language import language_body

CHUNKS = ("chunk_size", "mamba_chunk_size", "block_size")
SHORTEST = 64
"""Tokens; of a model that is computed in chunks a chunk, because it pads to whole ones."""


def kept_bytes(model: Any) -> tuple[float, float]:
    """Bytes of all layers a token, and a pair of tokens; (0, 0) where the model cannot be run so."""
    body: Any = language_body(model)
    chunk = max((getattr(body.config, name, None) or 0 for name in CHUNKS), default=0) or SHORTEST
    lengths = (chunk, 2 * chunk, 4 * chunk)
    for masked in (True, False):
        try:
            kept = [_kept(body, length, masked) for length in lengths]
        except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
            continue
        return _fitted(lengths, kept, keeps_scores=not attention_is_shared(body) or _is_eager(body))
    return 0.0, 0.0


def attention_is_shared(body: Any) -> bool:
    """Whether its layers take their attention from transformers' registry."""
    return hasattr(sys.modules[type(body).__module__], "ALL_ATTENTION_FUNCTIONS")


def _is_eager(body: Any) -> bool:
    return bool(body.config._attn_implementation == "eager")


def _fitted(lengths: Sequence[int], kept: Sequence[int], *, keeps_scores: bool) -> tuple[float, float]:
    """The meta device's SDPA keeps probabilities always. That of other devices does for the families that call it by
    themselves, such as Falcon, with fewer heads of keys than of queries."""
    a, b, c = lengths
    square = ((kept[2] - kept[1]) / (c - b) - (kept[1] - kept[0]) / (b - a)) / (c - a)
    width = (kept[1] - kept[0]) / (b - a) - square * (a + b)
    return max(0.0, width), max(0.0, square) if keeps_scores else 0.0


def _kept(body: Any, length: int, masked: bool) -> int:
    owned = {_place(parameter) for parameter in body.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _place(tensor) not in owned:
            kept[_place(tensor)] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    # One of four dimensions is taken as it is; to look into one of two, as some do, needs its numbers.
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta") if masked else None
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        mock.patch("transformers.integrations.moe._can_use_grouped_mm", return_value=False),
    ):
        body(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
