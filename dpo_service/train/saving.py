"""A run to a checkpoint and back.

    snapshot (every rank, in the loop: device -> host memory) ──> write (rank 0, on a thread: host memory -> files)

The model is stored once: `model/` (or `adapter/`) holds the weights that were trained, to the bit. Where float32
weights go out in bfloat16, the float32 ones lie in `state/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo_service.checkpoint import state as files
from dpo_service.checkpoint.format import ADAPTER, MODEL, STATE
from dpo_service.checkpoint.load import Checkpoint
from dpo_service.checkpoint.probe import FILE as PROBE
from dpo_service.checkpoint.probe import Probe
from dpo_service.errors import CheckpointError
from dpo_service.specs.run import RunSpec
from dpo_service.train.optim import load_optimizer_tensors, optimizer_tensors, trained_parameters
from dpo_service.train.policy import (
    WEIGHT_DTYPE,
    add_adapter,
    export_adapter,
    export_model,
    load_adapter,
    load_model,
    merged_state,
)
from dpo_service.train.ranks import host_copy, whole
from dpo_service.train.step import TrainState

EXPORT_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "pure_bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Snapshot:
    """The tensors of a checkpoint in host memory; none that training goes on to change."""

    policy: Any
    """For its class and configuration; its weights are not read."""
    model: dict[str, Tensor]
    """By name in the base model, adapters added in."""
    trained: dict[str, Tensor]
    """By parameter name; shared with `model` where it is the whole model that is trained."""
    optimizer: dict[str, Tensor]
    """Empty where the model is sharded: `shares` has it."""
    reference: dict[str, Tensor]
    """The weights of a reference that moves; else empty."""


@torch.no_grad()
def snapshot(state: TrainState) -> Snapshot | None:
    """The state as it is now. To be called on every rank; None on all but the first.

    The weights of a sharded model are gathered a tensor at a time, and only the first rank keeps them.
    """
    parameters, keep = trained_parameters(state.policy), state.ranks.first
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())
    if not keep and not sharded:
        return None
    trained = _to_host(parameters, keep)
    names = {_place(parameter): name for name, parameter in parameters.items()}
    merged = merged_state(state.policy)
    # What is not trained does not change, so on a CPU it need not be copied.
    moved = {name: t for name, t in merged.items() if isinstance(t, DTensor) or t.device.type != "cpu"}
    model = merged | _to_host({name: t for name, t in moved.items() if _place(t) not in names}, keep)
    optimizer = {} if sharded else _to_host(optimizer_tensors(state.optimizer, state.policy), keep)
    reference = _to_host(state.moving.weights if state.moving else {}, keep)
    if not keep:
        return None
    model |= {name: trained[names[_place(t)]] for name, t in merged.items() if _place(t) in names}
    if state.ranks.device.type == "cuda":
        torch.cuda.synchronize(state.ranks.device)
    return Snapshot(state.policy, model, trained, optimizer, reference)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where it lies: the same for two names of one tensor. Storage, because an empty share has no address."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr(), int(local.storage_offset())


def _to_host(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies in host memory, if they are to be kept."""
    gathered = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: host_copy(tensor) for name, tensor in gathered if keep}


def write(
    directory: Path, taken: Snapshot, probe: Probe, run: RunSpec, model_dir: Path, counters: dict[str, Any]
) -> None:
    """Fill a checkpoint directory, but for what `shares` puts there."""
    written = export_model(taken.policy, taken.model, model_dir, directory / MODEL, EXPORT_DTYPE[run.precision])
    probe = probe.model_copy(update={"weights": files.digest_each(written)})
    (directory / PROBE).write_text(probe.model_dump_json())
    if run.lora is not None:
        export_adapter(taken.policy, taken.trained, directory / ADAPTER, run.model.name)
    elif has_masters(run) and taken.optimizer:
        files.write_tensors(directory / STATE / files.WEIGHTS, taken.trained)
    if taken.optimizer:
        files.write_tensors(directory / STATE / files.OPTIMIZER, taken.optimizer)
    if taken.reference:
        files.write_tensors(directory / STATE / files.REFERENCE, taken.reference)
    files.write_counters(directory / STATE, counters)


def load_policy(run: RunSpec, model_dir: Path, checkpoint: Checkpoint | None, device: torch.device) -> Any:
    """The policy as at the start of the run, or as `checkpoint` left it."""
    if run.lora is not None:
        base = load_model(model_dir, device, run.precision, quantize=run.lora.quantize)
        return load_adapter(base, checkpoint.adapter) if checkpoint else add_adapter(base, run.lora, run.seed)
    if checkpoint is None:
        return load_model(model_dir, device, run.precision)
    policy = load_model(checkpoint.model, device, run.precision)
    if has_masters(run):
        parameters = trained_parameters(policy)
        with torch.no_grad():
            for name, weight in files.read_each(checkpoint.state, files.WEIGHTS):
                parameters[name].copy_(weight)
    return policy


def has_masters(run: RunSpec) -> bool:
    """Whether a whole model is trained, and what is exported of it is less exact."""
    return run.lora is None and EXPORT_DTYPE[run.precision] != WEIGHT_DTYPE[run.precision]


def restore_optimizer(state: TrainState, checkpoint: Checkpoint) -> None:
    tensors = files.read_each(checkpoint.state, files.OPTIMIZER)
    load_optimizer_tensors(state.optimizer, state.policy, tensors)


def reference_digest(run: RunSpec, weights: Mapping[str, Tensor], base_digest: str) -> str | None:
    """What identifies the reference: the model it is, or the weights it has moved to."""
    if run.reference.mode == "none":
        return None
    return files.digest_tensors(weights) if run.reference.refresh else base_digest


def restore_reference(state: TrainState, checkpoint: Checkpoint, base_digest: str) -> None:
    """Raises CheckpointError when the reference is not the one the checkpoint was trained against."""
    weights = files.read_tensors(checkpoint.state / files.REFERENCE) if state.moving else {}
    if reference_digest(state.run, weights, base_digest) != checkpoint.manifest.reference_digest:
        raise CheckpointError(f"{checkpoint.key} was trained against another reference; start a new job")
    if state.moving is not None:
        state.moving.load(weights)


def counters(checkpoint: Checkpoint) -> dict[str, Any]:
    return files.read_counters(checkpoint.state)
