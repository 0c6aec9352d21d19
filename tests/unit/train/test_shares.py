"""Ranks meet in a directory: whole tensors come back, and a rank that failed is not waited for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import SafetensorError

from dpo_service.checkpoint.state import OPTIMIZER, read_each
from dpo_service.errors import CheckpointError
from dpo_service.train.shares import FAILED, Share, collect, write


def share(rank: int, rows: torch.Tensor) -> Share:
    tensors = {"w|exp_avg": rows} | ({"w|step": torch.tensor(3.0)} if rank == 0 else {})
    return Share(rank, 3, {OPTIMIZER: tensors})


def test_the_whole_is_put_together_in_the_order_of_the_ranks(tmp_path):
    """Two rows over three ranks: the last holds none."""
    whole = torch.arange(8.0).view(2, 4)
    parts = [whole[:1], whole[1:], whole[2:]]
    meeting, target = tmp_path / "meeting", tmp_path / "state"
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(collect, share(0, parts[0]), meeting, target)
        for rank in (2, 1):
            write(share(rank, parts[rank]), meeting)
        done.result()
    assert not meeting.exists()
    read = dict(read_each(target, OPTIMIZER))
    assert torch.equal(read["w|exp_avg"], whole)
    assert float(read["w|step"]) == 3.0


def test_rank_0_does_not_wait_for_one_that_could_not_write(tmp_path):
    meeting = tmp_path / "meeting"
    (meeting / "optimizer-00002-of-00003.safetensors.part").mkdir(parents=True)
    with pytest.raises(SafetensorError):
        write(share(1, torch.zeros(1)), meeting)
    assert (meeting / FAILED).exists()
    with pytest.raises(CheckpointError, match="rank 1 has not written"):
        collect(share(0, torch.zeros(1)), meeting, tmp_path / "state")
