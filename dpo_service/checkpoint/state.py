"""Training state as tensors by name plus JSON: safetensors, so that loading never executes anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

OPTIMIZER, WEIGHTS = "optimizer.safetensors", "weights.safetensors"
REFERENCE, COUNTERS = "reference.safetensors", "counters.json"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors`; they must not share memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(path))


def share_name(whole: str, rank: int, world: int) -> str:
    """The file of one rank's share of the tensors that `whole` would hold: optimizer-00002-of-00008.safetensors."""
    stem, _, suffix = whole.partition(".")
    return f"{stem}-{rank + 1:05d}-of-{world:05d}.{suffix}"


def read_each(directory: Path, whole: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by name, one in memory at a time: from the file `whole`, or put together from the ranks' shares of it,
    which are cut along the first dimension."""
    shares = sorted(directory.glob(share_name(whole, 0, 1).replace("00001", "?????")))
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, "pt")) for path in shares or [directory / whole]]
        names = [set(file.keys()) for file in opened]
        for name in opened[0].keys():  # noqa: SIM118 - not a mapping
            parts = [file.get_tensor(name) for file, known in zip(opened, names, strict=True) if name in known]
            yield name, parts[0] if len(parts) == 1 else torch.cat(parts)


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bits; `tensors` lie in host memory."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        total.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def digest_each(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """`digest_tensors` of each tensor by itself, by its name."""
    return {name: digest_tensors({name: tensor}) for name, tensor in tensors.items()}


def write_counters(directory: Path, counters: Mapping[str, Any]) -> None:
    """`counters` as JSON. Floats come back bit for bit (repr round-trips)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / COUNTERS).write_text(json.dumps(dict(counters), indent=1, sort_keys=True))


def read_counters(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / COUNTERS).read_text()))
