"""Whole weights from a trainer's GPU to the samplers' without the host: vLLM's own NCCL and CUDA IPC transfers.

    every rank: DeviceSender.send ── gathers its shards, a tensor at a time
    rank 0:     SamplersClient ── check, start ── broadcast (nccl) or handles (ipc) ── finish ──> the version is set

NCCL between devices, IPC on a device that trainer and sampler share (its samplers are woken first). A sampler that was
restarted is in no group any more: `connect` makes a new one of those that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dpo_service.online.actors import RaySampler
from dpo_service.online.weights import Shapes
from dpo_service.specs.sampling import SamplerSpec


class SamplersClient:
    """vLLM's VLLMWeightSyncClient over all samplers: each call is made of all at once and waits for all."""

    def __init__(self, samplers: Sequence[RaySampler]) -> None:
        self._handles = [sampler.handle for sampler in samplers]
        self.version = 0
        """That the next update makes."""

    def check(self, shapes: Shapes) -> None:
        """Raises WeightsRefused if a sampler's model has other tensors."""
        self._all("check_tensors", dict(shapes))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        import ray

        offset = int(init_info.get("rank_offset", 0))
        size = (int(init_info["world_size"]) - offset) // len(self._handles) if "world_size" in init_info else 0
        # Each sampler's own ranks follow those of the one before it.
        places = range(len(self._handles))
        each = [init_info | ({"rank_offset": offset + place * size} if size else {}) for place in places]
        ray.get([h.init_weight_transfer_engine.remote(info) for h, info in zip(self._handles, each, strict=True)])

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update", self.version if weight_version is None else int(weight_version))

    def _all(self, method: str, *arguments: Any) -> None:
        import ray

        ray.get([getattr(handle, method).remote(*arguments) for handle in self._handles])


class DeviceSender:
    """The trainer's side; one on every rank of it, and every call is made on every rank."""

    def __init__(self, policy: nn.Module, spec: SamplerSpec, client: SamplersClient, rank: int) -> None:
        if spec.sync == "file":
            raise ValueError("weights go from device to device on GPUs only; on the CPU publish them as a file")
        self._spec, self._client, self._rank = spec, client, rank
        self._source = _source(policy)
        self._engine: Any = None

    def connect(self, address: str, port: int) -> None:
        """Meet the samplers. `address` and a free `port` are rank 0's; over IPC nobody needs them."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        if self._engine is not None:
            self._engine.shutdown()
        self._engine = WeightTransferTrainerFactory.trainer_init(
            init_info(self._spec, self._rank, address, port), client=self._client, source=self._source
        )

    def send(self, version: int) -> None:
        """Make the policy's weights, as they are now, the samplers' `version`.

        Raises:
            WeightsRefused: they are not of the samplers' model. Nothing was sent.
        """
        if self._rank == 0:
            self._client.check({tensor.name: tuple(tensor.shape) for tensor in self._source.metadata()})
            self._client.version = version
        self._engine.send_weights()


def init_info(spec: SamplerSpec, rank: int, address: str, port: int) -> Any:
    """What a trainer's side of the transfer is made of."""
    if spec.sync == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=rank, packed=True)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(
        rank=rank, master_address=address, master_port=port, world_size=1 + spec.samplers * spec.gpus
    )


def _source(policy: nn.Module) -> Any:
    """The policy's parameters by their names in its files, each gathered when it is its turn."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    return ModuleSource(policy)
