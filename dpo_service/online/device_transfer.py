"""Whole weights from a trainer's GPU to the samplers' without the host: vLLM's own NCCL and CUDA IPC transfers.

    rank 0      meet: who is there? ── others than last time ──> a new group of those that are
    every rank  send ── PolicySource: names and type as in a model's files, a layer at a time ──> vLLM's transfer
    rank 0      SamplersClient ── start: gates close ── broadcast (nccl) or handles (ipc) ── finish: the version is set,
                gates open

NCCL between devices: rank 0 sends to every sampler. IPC on a device that trainer and sampler share: each rank lays its
tensors open to the sampler beside it, which is woken for it. The trainer waits for the gates, that is for two rounds of
answers at most; the pairs it needs next are made of these very answers, so it would wait for them anyway.

A sampler that died between two transfers is not there, or in no group any more: `meet` sees it. One that dies within a
transfer breaks it (`TransferBroken`): the worker fails, and Ray Train starts the group again from the newest
checkpoint, with new samplers, because NCCL has no way back from half a broadcast.
"""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_service.errors import DpoServiceError, SamplerLost
from dpo_service.ids import random_suffix
from dpo_service.online.weights import Shapes
from dpo_service.specs.sampling import SamplerSpec
from dpo_service.train.policy import base_of

BUFFER_BYTES = 1 << 30
"""Tensors travel packed into buffers of this size, or of the largest tensor's where that is more."""
_LAYER = re.compile(r".*?\.\d+\.")


class TransferBroken(RuntimeError):
    """A sampler was lost while weights were on their way to it; the worker is to be started again."""


class Described(NamedTuple):
    """A tensor as vLLM's sources announce it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PolicySource:
    """A policy's weights by their names in a model's files, in the samplers' type: what vLLM calls a WeightSource."""

    def __init__(self, policy: Any, dtype: str) -> None:
        self._model, self._dtype = base_of(policy), getattr(torch, dtype)
        self.instead: Mapping[str, Tensor] = {}
        """Of parameters, by their names in the policy: what is sent in their place."""
        self._metadata: list[Described] | None = None

    def metadata(self) -> list[Described]:
        """What iterating gives, without giving it."""
        if self._metadata is None:
            shells = {name: torch.empty_like(tensor, device="meta") for name, tensor in self._state().items()}
            self._metadata = [
                Described(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._renamed(shells)
            ]
        return self._metadata

    def shapes(self) -> Shapes:
        return {one.name: one.shape for one in self.metadata()}

    def buffer_bytes(self) -> int:
        largest = max(torch.Size(one.shape).numel() * one.dtype.itemsize for one in self.metadata())
        return max(BUFFER_BYTES, largest)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._renamed({name: self.instead.get(name, tensor) for name, tensor in self._state().items()})

    def _state(self) -> dict[str, Tensor]:
        """Of tensors that are the same (a tied output head) the first."""
        shared = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        shared -= {name for name, _ in self._model.named_parameters()}
        return {name: tensor for name, tensor in self._model.state_dict().items() if name not in shared}

    def _renamed(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """A layer at a time, since what a file has as one tensor the model may have in parts, or the other way."""
        from transformers.core_model_loading import revert_weight_conversion

        for _, names in itertools.groupby(state, key=_layer_of):
            for name, tensor in revert_weight_conversion(self._model, {name: state[name] for name in names}).items():
                yield name, tensor.detach().to(self._dtype).contiguous()


def _layer_of(name: str) -> str:
    found = _LAYER.match(name)
    return found[0] if found else name


@dataclass(frozen=True)
class Call:
    """A method of one sampler's actor."""

    sampler: Any
    method: str
    arguments: tuple[Any, ...] = ()


Ask = Callable[[Sequence[Call]], list[Any]]
"""Makes calls at the same time and waits for all: the answers, or the SamplerLost of one whose process has died."""


def ask_actors(calls: Sequence[Call]) -> list[Any]:
    """`Ask` of Ray's actors. What a method raised is raised."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    def answer(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except RayActorError as error:
            return SamplerLost(f"a sampler's process has died: {error}")
        except RayTaskError as error:
            if isinstance(error.cause, SamplerLost):
                return error.cause
            if isinstance(error.cause, DpoServiceError):
                raise error.cause from error
            raise

    return [answer(one) for one in [getattr(c.sampler, c.method).remote(*c.arguments) for c in calls]]


def free_address() -> tuple[str, int]:
    """This machine as the cluster reaches it, and a port that nobody has."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), int(probe.getsockname()[1])


class SamplersClient:
    """vLLM's VLLMWeightSyncClient over the samplers that are there: each call is made of all at once, waits for all."""

    def __init__(self, samplers: Sequence[Any], ask: Ask) -> None:
        """`samplers` are the handles of their actors."""
        self._samplers, self._ask = list(samplers), ask
        self._members: list[Any] = []
        self._group = ""
        self.version = 0
        """That the next update makes."""
        self.broke: Callable[[], None] = lambda: None
        """Called where a sampler was lost while it received, and the sender may be waiting for it on its device."""

    @property
    def members(self) -> int:
        """Samplers of the group."""
        return len(self._members)

    def meet(self) -> bool:
        """Look who is there; waits for one, if nobody is. True: they are not those of the last transfer, or one of them
        was restarted since, and a group is to be made of them.

        Raises:
            TransferBroken: all of them have died for good.
        """
        there = self._there() or self._waited_for()
        members = [sampler for sampler, _ in there]
        if members == self._members and all(group == self._group for _, group in there):
            return False
        self._members, self._group = members, random_suffix(8)
        return True

    def _there(self) -> list[tuple[Any, str]]:
        found = self._ask([Call(sampler, "group") for sampler in self._samplers])
        answers = zip(self._samplers, found, strict=True)
        return [(sampler, group) for sampler, group in answers if not isinstance(group, SamplerLost)]

    def _waited_for(self) -> list[tuple[Any, str]]:
        """`version` is answered by a sampler that is being restarted, once it has been."""
        found = self._ask([Call(sampler, "version") for sampler in self._samplers])
        there = self._there()
        if not there:
            lost = next((one.message for one in found if isinstance(one, SamplerLost)), "they died again")
            raise TransferBroken(f"there is no sampler left to send weights to: {lost}")
        return there

    def check(self, shapes: Shapes) -> None:
        """Raises WeightsRefused if a sampler's model has other tensors."""
        self._all("check_tensors", dict(shapes))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offset = int(init_info.get("rank_offset", 0))
        size = (int(init_info["world_size"]) - offset) // self.members if "world_size" in init_info else 0
        # Each sampler's own ranks follow those of the one before it.
        places = [init_info | ({"rank_offset": offset + place * size} if size else {}) for place in range(self.members)]
        calls = zip(self._members, places, strict=True)
        self._done([Call(sampler, "join_group", (info, self._group)) for sampler, info in calls])

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        try:
            self._all("update_weights", update_info)
        except BaseException:
            self.broke()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update", self.version if weight_version is None else int(weight_version))

    def _all(self, method: str, *arguments: Any) -> None:
        self._done([Call(sampler, method, arguments) for sampler in self._members])

    def _done(self, calls: Sequence[Call]) -> None:
        lost = next((answer for answer in self._ask(calls) if isinstance(answer, SamplerLost)), None)
        if lost is not None:
            raise TransferBroken(f"the weights did not arrive: {lost.message}") from lost


class DeviceSender:
    """The trainer's side; one on every rank of it, and `send` is called on every rank."""

    def __init__(
        self,
        policy: Any,
        spec: SamplerSpec,
        *,
        rank: int,
        client: SamplersClient | None,
        address: Callable[[], tuple[str, int]],
    ) -> None:
        """`client` is rank 0's. `address` gives a host and a free port of rank 0's machine, where a group meets; only
        NCCL asks for it."""
        if spec.sync == "file":
            raise ValueError("weights go from device to device on GPUs only; on the CPU publish them as a file")
        self._spec, self._rank, self._client, self._address = spec, rank, client, address
        self._source = PolicySource(policy, spec.dtype)
        self._engine: Any = None

    def check(self) -> None:
        """On rank 0, before the first `send`. Raises WeightsRefused if the samplers' model has other tensors."""
        assert self._client is not None, "rank 0 has one"
        self._client.meet()
        self._client.check(self._source.shapes())
        self._connect()

    def send(self, version: int, instead: Mapping[str, Tensor] | None = None) -> None:
        """Make the policy's weights, as they are now, the samplers' `version`; of parameters in `instead` those.

        Raises:
            TransferBroken: a sampler died of it, or meanwhile, or there is none any more.
        """
        if self._client is not None:
            if self._client.meet():
                self._connect()
            self._client.version = version
        elif self._engine is None:
            self._connect()
        self._source.instead = instead or {}
        self._engine.send_weights()

    def _connect(self) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        if self._engine is not None:
            self._engine.shutdown()
        # The group is rank 0's and the samplers'; the other ranks only take part in gathering.
        meets = self._client is not None and self._spec.sync == "nccl"
        address = self._address() if meets else ("", 0)
        members = self._client.members if self._client is not None else 0
        info = init_info(self._spec, self._rank, address, members, self._source.buffer_bytes())
        engine = WeightTransferTrainerFactory.trainer_init(init_info=info, client=self._client, source=self._source)
        if self._client is not None:
            self._client.broke = lambda: _give_up(engine)
        self._engine = engine


def _give_up(engine: Any) -> None:
    """Let go of a broadcast that one receiver has left: what waits for it on the device returns."""
    communicator = getattr(engine, "model_update_group", None)
    if communicator is not None:
        communicator.destroy()


def init_info(spec: SamplerSpec, rank: int, address: tuple[str, int], members: int, buffer_bytes: int) -> Any:
    """What a trainer's side of the transfer to `members` samplers is made of."""
    if spec.sync == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer_bytes)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    host, port = address
    return NCCLTrainerInitInfo(
        rank=rank,
        master_address=host,
        master_port=port,
        world_size=1 + members * spec.gpus,
        packed_buffer_size_bytes=buffer_bytes,
    )
