"""Training state as tensors by name plus JSON: safetensors, so that loading never executes anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

OPTIMIZER, WEIGHTS, COUNTERS = "optimizer.safetensors", "weights.safetensors", "counters.json"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors`; they must not share memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(path))


def write_counters(directory: Path, counters: Mapping[str, Any]) -> None:
    """`counters` as JSON. Floats come back bit for bit (repr round-trips)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / COUNTERS).write_text(json.dumps(dict(counters), indent=1, sort_keys=True))


def read_counters(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / COUNTERS).read_text()))
