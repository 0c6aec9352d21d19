"""Where a run begins: the base model, or the newest checkpoint that verifies.

The reference is the job's own base model in either case, pinned by digest, never the resumed weights; unless it moves,
when it too comes from the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dpo_service.checkpoint.load import Checkpoint, newest_valid, opened
from dpo_service.errors import CheckpointError, TrainingError
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.specs.run import RunSpec
from dpo_service.storage.store import Store
from dpo_service.train import saving
from dpo_service.train.layers import prepare_layers
from dpo_service.train.moving import MovingReference
from dpo_service.train.optim import build_optimizer
from dpo_service.train.policy import base_of, load_model
from dpo_service.train.ranks import CPU, Ranks
from dpo_service.train.reference import Reference, build_reference
from dpo_service.train.router import require_router
from dpo_service.train.sharding import shard
from dpo_service.train.step import TrainState


def agreed_checkpoint(store: Store, job_id: str, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint all ranks go on from: rank 0 verifies, the others open the one it found."""
    found = newest_valid(store, job_id) if ranks.first else None
    step = int(ranks.sum([float(found.manifest.step) if found else 0.0])[0])
    if ranks.first or step == 0:
        return found
    return opened(store, job_id, step)


def build_state(
    run: RunSpec, model_dir: Path, checkpoint: Checkpoint | None, ranks: Ranks, total_steps: int, base_digest: str
) -> TrainState:
    """Policy, optimizer and a reference that moves as at the start of the run, or as `checkpoint` left them; one that
    does not move is the base model's.

    Raises:
        CheckpointError: the checkpoint was trained against another reference.
        TrainingError: the job asks of the model what it has not.
    """
    sharded = run.resources.strategy == "fsdp" and ranks.world > 1
    policy = saving.load_policy(run, model_dir, checkpoint, CPU if sharded else ranks.device)
    prepare_layers(policy, run)
    if run.router_aux_loss_coef:
        require_router(base_of(policy))
    if sharded:
        shard(base_of(policy), ranks, run.precision)
    reference = _reference(run, policy, model_dir, ranks, sharded)
    state = TrainState(run, policy, reference, build_optimizer(policy, run.optim, run.seed), ranks, total_steps)
    if checkpoint is not None:
        saving.restore_optimizer(state, checkpoint)
        saving.restore_reference(state, checkpoint, base_digest)
        state.drift.copy_(torch.tensor(saving.counters(checkpoint).get("drift", (0.0, 0.0)), dtype=torch.float64))
    return state


def _reference(run: RunSpec, policy: Any, model_dir: Path, ranks: Ranks, sharded: bool) -> Reference:
    if run.reference.refresh is not None:
        return MovingReference(policy, model_dir, run.reference.refresh, run.precision, run.loss.ld_alpha)

    def frozen_copy() -> Any:
        model = load_model(model_dir, CPU if sharded else ranks.device, run.precision).requires_grad_(False)
        return shard(model, ranks, run.precision) if sharded else model

    return build_reference(run.reference.mode, policy, frozen_copy, run.precision, run.loss.ld_alpha)


def counters_of(checkpoint: Checkpoint, dataset: DatasetManifest, base_digest: str) -> dict[str, Any]:
    """What the checkpoint counted, if it is one of this job as it now stands.

    Raises:
        CheckpointError: it was trained from another base model, or on another dataset.
    """
    manifest, counters = checkpoint.manifest, saving.counters(checkpoint)
    if manifest.base_digest != base_digest:
        raise CheckpointError(
            f"{checkpoint.key} was trained from another base model (digest {manifest.base_digest[:12]}, "
            f"now {base_digest[:12]}); put the original model back or start a new job"
        )
    if counters["dataset_digest"] != dataset.train.digest:
        raise CheckpointError(f"{checkpoint.key} was trained on another dataset; start a new job")
    return counters


def check_reference(run: RunSpec, dataset: DatasetManifest, has_reference: bool, base_digest: str) -> None:
    """The reference is the job's own base model: pinned by digest, checked at every start."""
    if run.reference.mode != "cached":
        return
    if dataset.reference_digest not in (None, base_digest):
        raise TrainingError("the cached reference log-probabilities come from another model than the job's base")
    if not has_reference:
        raise TrainingError("the dataset holds no reference log-probabilities, and the job says they are cached")
