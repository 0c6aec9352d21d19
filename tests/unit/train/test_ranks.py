"""Two gloo processes give the one-process result; a checkpoint of one world size goes on in another."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.multiprocessing as mp

from dpo_service.train.ranks import Ranks
from tests.unit.train.training_kit import Job, Recorder, make_job


def run_rank(rank: int, port: int, job: Job, losses) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    recorded = Recorder()
    outcome = job.train(ranks=Ranks(rank, 2), reports=recorded)
    assert outcome.steps == job.run.batch.max_steps
    if rank == 0:
        losses.put((recorded.values, recorded.messages))
    else:
        assert recorded.values == {}
    torch.distributed.destroy_process_group()


def train_on_two(job: Job):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    losses = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run_rank, (port, job, losses), nprocs=2)
    return losses.get()


def of(values, split, name):
    return [metrics[name] for (kind, _), metrics in sorted(values.items()) if kind == split]


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_two_ranks_equal_one(tmp_path, model_dir, loss):
    """Batches of 7, so that the ranks' shares differ; then the same run goes on alone."""
    options = {
        "batch_size": 7,
        "micro_batch_size": 2,
        "steps": 6,
        "save_every_steps": 3,
        "reference": "live",
        "loss": loss,
    }
    alone = Recorder()
    make_job(tmp_path / "one", model_dir, **options).train(reports=alone)
    two = make_job(tmp_path / "two", model_dir, **options)
    values, messages = train_on_two(two)
    assert messages[0] == "Training on 2 workers, 48 rows, 6 steps"
    for split in ("train", "eval"):
        for name in ("loss", "rewards/chosen", "logps/rejected", "kl" if loss == "kto" else "rewards/accuracies"):
            assert of(values, split, name) == pytest.approx(of(alone.values, split, name), rel=1e-5, abs=1e-6)
    assert of(values, "train", "grad_norm") == pytest.approx(of(alone.values, "train", "grad_norm"), rel=1e-4)
    assert of(values, "train", "num_tokens") == of(alone.values, "train", "num_tokens")
    two.store.delete("jobs/j/checkpoints/step-00000006")
    resumed = Recorder()
    two.train(reports=resumed)
    assert resumed.losses() == pytest.approx(alone.losses()[3:], rel=1e-5)
