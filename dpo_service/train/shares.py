"""What only a resumed run reads (optimizer, float32 weights) of a sharded model: nobody holds it whole.

    rank r    its rows of every tensor ─> .step-N.NAME.tmp/optimizer-0000r-of-0000n.safetensors
    rank 0    the same; waits for the others' files, and moves them all to the checkpoint's state/

FSDP2 cuts tensors along their first dimension, in the order of the ranks: the whole is the files put together
(`checkpoint.state.read_each`), and another number of ranks cuts it anew. All of it happens on the checkpoint threads,
through the storage that the workers share, so no collective call can come between those of training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo_service.checkpoint import state as files
from dpo_service.errors import CheckpointError
from dpo_service.train.optim import optimizer_tensors, trained_parameters
from dpo_service.train.ranks import host_copy
from dpo_service.train.step import TrainState

WAIT_S = 600.0
"""How long rank 0 waits for the others' files."""
POLL_S = 0.02
FAILED = "failed"


@dataclass(frozen=True)
class Share:
    """One rank's, in host memory; none that training goes on to change."""

    rank: int
    world: int
    tensors: dict[str, dict[str, Tensor]]
    """By the name of the file that would hold the whole, then by tensor."""

    def written_as(self, rank: int) -> list[str]:
        return [files.share_name(whole, rank, self.world) for whole in self.tensors]


@torch.no_grad()
def take(state: TrainState, *, masters: bool) -> Share | None:
    """This rank's share; None of a model that is not sharded. `masters`: the weights too."""
    parameters = trained_parameters(state.policy)
    if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        return None
    tensors = {files.OPTIMIZER: _own(optimizer_tensors(state.optimizer, state.policy), state.ranks.first)}
    if masters:
        tensors[files.WEIGHTS] = _own(parameters, state.ranks.first)
    if state.ranks.device.type == "cuda":
        torch.cuda.synchronize(state.ranks.device)
    return Share(state.ranks.rank, state.ranks.world, tensors)


def _own(tensors: Mapping[str, Tensor], first: bool) -> dict[str, Tensor]:
    """What is not sharded (step counts) is the first rank's."""
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: host_copy(local[name]) for name, t in tensors.items() if first or isinstance(t, DTensor)}


def write(share: Share, directory: Path) -> None:
    """Put the files of `share` into `directory`, each at once and durably."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        for name, tensors in zip(share.written_as(share.rank), share.tensors.values(), strict=True):
            part = directory / f"{name}.part"
            files.write_tensors(part, tensors)
            with part.open("rb") as written:
                os.fsync(written.fileno())
            part.rename(directory / name)
    except Exception:  # whatever it was, rank 0 is not to wait
        (directory / FAILED).touch()
        raise


def collect(share: Share, directory: Path, target: Path) -> None:
    """Move the files of all ranks from `directory` to `target`; rank 0's are written first.

    Raises:
        CheckpointError: a rank has not written its own.
    """
    write(share, directory)
    target.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + WAIT_S
    for rank in range(share.world):
        for name in share.written_as(rank):
            while not (directory / name).exists():
                if (directory / FAILED).exists() or time.monotonic() > deadline:
                    raise CheckpointError(f"rank {rank} has not written its share of the state, {name}")
                time.sleep(POLL_S)
            (directory / name).rename(target / name)
    directory.rmdir()
