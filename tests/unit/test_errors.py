"""What another attempt would meet again, and what may pass."""

from __future__ import annotations

import pytest
import ray.exceptions
import torch

from dpo_service.errors import CheckpointError, InvalidData, NonFiniteLoss, TrainingError, recurs


def from_a_task(error: Exception) -> ray.exceptions.RayTaskError:
    return ray.exceptions.RayTaskError("f", "traceback", error)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("content"),
        AttributeError("'tuple' object has no attribute 'dtype'"),
        TypeError("forward() got an unexpected keyword"),
        NotImplementedError("attention with s_aux"),
        ValueError("could not broadcast"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("Output 0 of _Linear is a view and is being modified inplace"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        InvalidData("no answer"),
        NonFiniteLoss("loss is nan"),
        from_a_task(KeyError("content")),
        from_a_task(KeyError("content")).as_instanceof_cause(),
    ],
    ids=str,
)
def test_these_come_again(error):
    assert recurs(error, computing=True)
    assert recurs(error) is not (type(error) is RuntimeError)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("by peer"),
        OSError(28, "No space left on device"),
        TimeoutError(),
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        RuntimeError("NCCL communicator was aborted"),
        torch.distributed.DistBackendError("NCCL error"),
        ray.exceptions.OutOfMemoryError("the memory monitor ended the task"),
        ray.exceptions.WorkerCrashedError(),
        from_a_task(OSError("gone")),
        TrainingError("the workers died"),
        CheckpointError("a digest differs"),
        Exception("of a library"),
    ],
    ids=str,
)
def test_these_may_pass(error):
    assert not recurs(error, computing=True)
