"""Which way a trainer's weights go to the samplers.

Files (`export`): on the CPU, and adapters everywhere; rank 0 writes them and goes on, the samplers take them when they
can. Devices, here: whole weights on GPUs; every rank takes part and waits until the samplers have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dpo_service.online.device_transfer import DeviceSender, SamplersClient, ask_actors, free_address
from dpo_service.online.export import Exporter, version_at
from dpo_service.online.port import Weights
from dpo_service.specs.sampling import SamplerSpec
from dpo_service.train.ranks import Ranks
from dpo_service.train.step import TrainState


class Exporting(Protocol):
    """What it gives is the curator's to know. One of devices is called on every rank, at the same places."""

    def first(self, step: int) -> Weights: ...
    def after(self, step: int) -> Weights | None: ...
    def drop_before(self, version: int) -> None: ...
    def close(self) -> None: ...


def exporter_of(
    state: TrainState,
    spec: SamplerSpec,
    every: int | None,
    ranks: Ranks,
    samplers: Sequence[Any],
    base_dir: Path | None,
    shared: Path | None,
) -> Exporting | None:
    """This rank's. `samplers` are the handles of those on GPUs, which rank 0 has; the rest as for `Exporter`.

    Raises:
        WeightsRefused: on rank 0, the samplers have another model.
    """
    if spec.sync == "file":
        return Exporter(state, spec.dtype, every, base_dir, shared) if ranks.first else None
    assert every is not None, "what is lent for an evaluation goes by files; admission has seen to it"
    client = SamplersClient(samplers, ask_actors) if ranks.first else None
    sender = DeviceSender(state.policy, spec, rank=ranks.rank, client=client, address=free_address)
    if ranks.first:
        sender.check()
    return DeviceExporter(state, sender, every)


class DeviceExporter:
    """Sends versions from device to device; which version when is as in `export`."""

    def __init__(self, state: TrainState, sender: DeviceSender, sync_every: int) -> None:
        self._state, self._sender, self._every = state, sender, sync_every

    def first(self, step: int) -> Weights:
        return self._send(*version_at(self._state, step, self._every))

    def after(self, step: int) -> Weights | None:
        return None if step % self._every else self._send(step, None)

    def drop_before(self, version: int) -> None:
        """Nothing lies anywhere."""

    def close(self) -> None:
        """Nothing to remove: the group goes with the processes."""

    def _send(self, version: int, instead: dict[str, Tensor] | None) -> Weights:
        self._sender.send(version, instead)
        return Weights(version, "device")
