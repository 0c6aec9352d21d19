"""Weights on their way to the samplers as files: safetensors in the machine's shared memory, mapped where they lie.

    trainer: publish ──> version-00000008.safetensors ──> sampler: check, then the engine maps it and copies once
                         (whole or not there)             names, shapes, types, digest: before the engine is touched,
                                                          because an update that fails leaves a torn model

Nothing is pickled. Where there is no shared memory, or too little, any folder that both sides can read serves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_service.errors import WeightsRefused
from dpo_service.ids import random_suffix
from dpo_service.online.port import Weights
from dpo_service.train.policy import base_of, export_adapter
from dpo_service.train.pretrained import HEAD, has_own_head

SHARED_MEMORY = Path("/dev/shm")
ADAPTER_TENSORS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEPT_AT_ONCE = 3
"""Versions that may lie there at the same time: the old one, the new one, and one that is being written."""
_NAME = re.compile(r"dpo-weights-(\d+)-\w+")
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}

Shapes = Mapping[str, tuple[int, ...]]


class WeightsFolder:
    """Where a trainer puts its versions; it goes with its process. One that was killed leaves it to the next one on the
    machine, which removes it."""

    def __init__(self, bytes_of_a_version: int, scratch: Path | None = None, *, shared: Path | None = None) -> None:
        """In `shared`, a folder that the samplers' machines see; without one in shared memory where it has room for the
        versions, else in `scratch` (default: the temp folder)."""
        memory = None if shared else shared_memory(KEPT_AT_ONCE * bytes_of_a_version)
        parent = shared or memory or scratch or Path(tempfile.gettempdir())
        remove_orphans(parent)
        self.path = parent / f"dpo-weights-{os.getpid()}-{random_suffix(8)}"
        self.path.mkdir(mode=0o700, parents=True)

    def publish(self, policy: Any, state: Mapping[str, Tensor], version: int, dtype: str) -> Weights:
        """The whole model as `version`. `state` is what `policy.merged_state` gave."""
        from transformers.core_model_loading import revert_weight_conversion

        # Its names in this process are not those in a model's files for every architecture.
        named = revert_weight_conversion(base_of(policy), _once(state))
        target = self.path / f"version-{version:08d}.safetensors"
        partial = target.with_suffix(".partial")
        save_file(_apart(named, getattr(torch, dtype)), partial)
        digest = _digest(partial)
        partial.rename(target)
        return Weights(version, "full", str(target), digest)

    def publish_adapter(self, policy: Any, trained: Mapping[str, Tensor], version: int) -> Weights:
        """The adapter as `version`. `trained` are its tensors by their names in the policy."""
        target = self.path / f"version-{version:08d}"
        partial = target.with_suffix(".partial")
        export_adapter(policy, dict(trained), partial, "")
        digest = _digest(partial / ADAPTER_TENSORS, partial / ADAPTER_CONFIG)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        return Weights(version, "adapter", str(target), digest)

    def drop_before(self, version: int) -> None:
        """Remove older versions. What maps them keeps its pages."""
        for path in self.path.glob("version-*"):
            if int(path.name.removeprefix("version-")[:8]) < version:
                _remove(path)

    def drop(self, version: int) -> None:
        """Remove one version, if it is there."""
        for path in self.path.glob(f"version-{version:08d}*"):
            _remove(path)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def shared_memory(size: int) -> Path | None:
    """The folder in memory, if there is one with room for `size` bytes."""
    if not (SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)):
        return None
    return SHARED_MEMORY if shutil.disk_usage(SHARED_MEMORY).free > size else None


def model_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, as its files have them; a tied output head is not among them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        shapes |= {name: shape for name, (shape, _) in _header(path).items()}
    config = json.loads((model_dir / "config.json").read_text())
    if config.get("tie_word_embeddings") and HEAD in shapes and not has_own_head(model_dir):
        del shapes[HEAD]
    return shapes


def check(weights: Weights, expected: Shapes, dtype: str) -> None:
    """Whether `weights` are whole and the weights of the model with the shapes `expected`, in `dtype`.

    Raises:
        WeightsRefused: they are not; the sentence says in what.
    """
    try:
        if weights.kind == "full":
            _check_full(Path(weights.path), weights.digest, expected, _DTYPES[dtype])
        else:
            _check_adapter(Path(weights.path), weights.digest, expected)
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsRefused(f"version {weights.version} is refused: {error}") from error


def _check_full(path: Path, digest: str, expected: Shapes, dtype: str) -> None:
    _check_digest(digest, path)
    header = _header(path)
    check_shapes({name: shape for name, (shape, _) in header.items()}, expected)
    for name, (_, found) in header.items():
        if found != dtype:
            raise ValueError(f"{name} is {found}, the sampler's weights are {dtype}")


def check_shapes(found: Shapes, expected: Shapes) -> None:
    """Raises ValueError if these are not the tensors of the model."""
    for name in sorted(found.keys() ^ expected.keys()):
        raise ValueError(f"{name} is {'missing' if name in expected else 'none of the model'}")
    for name, shape in found.items():
        if tuple(shape) != tuple(expected[name]):
            raise ValueError(f"{name} is {list(shape)}, the model's is {list(expected[name])}")


def _check_adapter(path: Path, digest: str, expected: Shapes) -> None:
    """Each of the adapter's matrices must fit the weight it adds to: A [rank, in], B [out, rank]."""
    _check_digest(digest, path / ADAPTER_TENSORS, path / ADAPTER_CONFIG)
    rank = json.loads((path / ADAPTER_CONFIG).read_text())["r"]
    header = _header(path / ADAPTER_TENSORS)
    if not header:
        raise ValueError("the adapter is empty")
    for name, (shape, _) in header.items():
        module, _, matrix = name.removeprefix("base_model.model.").rpartition(".lora_")
        base = expected.get(f"{module}.weight")
        if base is None:
            raise ValueError(f"{name} adds to nothing of the model")
        fits = {"A.weight": (rank, base[-1]), "B.weight": (base[0], rank)}.get(matrix)
        if shape != fits:
            raise ValueError(f"{name} is {list(shape)} where {list(fits) if fits else 'no such matrix'} is expected")


def _check_digest(expected: str, *paths: Path) -> None:
    if _digest(*paths) != expected:
        raise ValueError(f"{paths[0].name} is not as it was written")


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def _once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors that are the same (a tied output head) the first: the others are in no file of a model."""
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        first.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: state[name] for name in first.values()}


def _apart(named: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Each in memory of its own, as safetensors wants it."""
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in named.items():
        plain = tensor.detach().to("cpu", dtype).contiguous()
        storage = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return apart


def _digest(*paths: Path) -> str:
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def remove_orphans(parent: Path = SHARED_MEMORY) -> None:
    """Remove what killed trainers left in `parent`."""
    for folder in parent.glob("dpo-weights-*"):
        match = _NAME.fullmatch(folder.name)
        if match and not Path("/proc", match[1]).exists():
            shutil.rmtree(folder, ignore_errors=True)
