"""A run to a checkpoint and back.

The model is stored once: `model/` (or `adapter/`) holds the weights that were trained, in float32. Where they go out
in bfloat16, the float32 ones lie in `state/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dpo_service.checkpoint import state as files
from dpo_service.checkpoint.format import ADAPTER, MODEL, STATE
from dpo_service.checkpoint.load import Checkpoint
from dpo_service.specs.run import RunSpec
from dpo_service.train.optim import load_optimizer_tensors, optimizer_tensors, trained_parameters
from dpo_service.train.policy import add_adapter, export_adapter, export_model, load_adapter, load_model
from dpo_service.train.step import TrainState

EXPORT_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write(directory: Path, state: TrainState, model_dir: Path, counters: dict[str, Any]) -> None:
    """Fill a checkpoint directory."""
    run = state.run
    export_model(state.policy, model_dir, directory / MODEL, EXPORT_DTYPE[run.precision])
    if run.lora is not None:
        export_adapter(state.policy, directory / ADAPTER, run.model.name)
    elif run.precision != "float32":
        files.write_tensors(directory / STATE / files.WEIGHTS, trained_parameters(state.policy))
    files.write_tensors(directory / STATE / files.OPTIMIZER, optimizer_tensors(state.optimizer, state.policy))
    files.write_counters(directory / STATE, counters)


def load_policy(run: RunSpec, model_dir: Path, checkpoint: Checkpoint | None, device: torch.device) -> Any:
    """The policy as at the start of the run, or as `checkpoint` left it."""
    if run.lora is not None:
        base = load_model(model_dir, device)
        return load_adapter(base, checkpoint.adapter) if checkpoint else add_adapter(base, run.lora, run.seed)
    if checkpoint is None:
        return load_model(model_dir, device)
    policy = load_model(checkpoint.model, device)
    if run.precision != "float32":
        weights = files.read_tensors(checkpoint.state / files.WEIGHTS)
        with torch.no_grad():
            for name, parameter in trained_parameters(policy).items():
                parameter.copy_(weights[name])
    return policy


def restore_optimizer(state: TrainState, checkpoint: Checkpoint) -> None:
    tensors = files.read_tensors(checkpoint.state / files.OPTIMIZER)
    load_optimizer_tensors(state.optimizer, state.policy, tensors)


def counters(checkpoint: Checkpoint) -> dict[str, Any]:
    return files.read_counters(checkpoint.state)
