"""The process group as the loop sees it; with one process every operation is the identity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo_service.specs.room import BUCKET_BYTES

CPU = torch.device("cpu")
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""torch.distributed's backend by the type of device computed on."""


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world` processes, computing on `device`.

    With world > 1 torch.distributed is initialised, with gloo for the CPU beside what `device` needs (`BACKENDS`).
    """

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks, in float64. Between the hosts (gloo): no device is waited for."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def gather(self, value: float) -> list[float]:
        """`value` of every rank, by rank."""
        return self.sum([value if rank == self.rank else 0.0 for rank in range(self.world)])

    def sum_tensor(self, tensor: Tensor) -> None:
        """Element-wise sum over ranks, in place, where the tensor lies."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over ranks in place, float32, in buckets.

        A sum and not a mean, because each rank's loss is already divided by the whole step's rows. A rank that had no
        rows in this step takes part with zeros. Those of a sharded model are summed already.
        """
        if self.world == 1:
            return
        trained = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if not trained:
            return
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in trained if parameter.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            flat = flat.float() if flat.dtype == torch.bfloat16 else flat
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank (all must ask); another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def host_copy(tensor: Tensor) -> Tensor:
    """In host memory. From a GPU it goes through pinned memory, and is there when the device has been waited for."""
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copied.copy_(tensor, non_blocking=True)


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """A copy of `value`, the same on every rank, where and as `like` lies: on its device, and sharded as it is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value.to(like.device, copy=True)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for gradient in gradients:
        if size > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.numel() * gradient.element_size()
    return buckets
