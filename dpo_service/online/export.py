"""A trainer's weights on their way to the samplers: which version when, and from where in the training state.

every step        the policy after step v is version v
every iteration   the policy at its end, which is the reference from there on; so a run that is resumed within an
                  iteration samples from its reference, which is in the checkpoint
never             the samplers keep the base model: version 0

An evaluation is of the policy as it is. Where the samplers are not to train on that, it is lent to them: version v for
a moment, and then what they held again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dpo_service.online.port import Weights
from dpo_service.online.weights import WeightsFolder
from dpo_service.train.optim import trained_parameters
from dpo_service.train.policy import base_of, load_model, merged_state
from dpo_service.train.step import TrainState

BYTES = {"float32": 4, "bfloat16": 2}


class Exporter:
    """Writes versions as files. `close` removes them."""

    def __init__(
        self,
        state: TrainState,
        dtype: str,
        sync_every: int | None,
        base_dir: Path | None = None,
        shared: Path | None = None,
    ) -> None:
        """`dtype` is that of the samplers' weights, `sync_every` in steps; None = never, and then `base_dir` is where
        the base model lies. Files are in this machine's memory, or in the folder `shared`, which samplers on other
        machines see too."""
        self._state, self._dtype, self._every, self._base_dir = state, dtype, sync_every, base_dir
        self._held: Weights | None = None
        self._lent: int | None = None
        self._adapter = base_of(state.policy) is not state.policy
        sent = trained_parameters(state.policy).values() if self._adapter else state.policy.parameters()
        count = sum(parameter.numel() for parameter in sent)
        self._folder = WeightsFolder(count * (4 if self._adapter else BYTES[dtype]), shared=shared)

    @property
    def held(self) -> Weights:
        """What training samples come from."""
        assert self._held is not None, "a run starts with `first`"
        return self._held

    def first(self, step: int) -> Weights:
        """What step number `step` is sampled from at the latest, when a run begins there."""
        if self._every is None:
            self._held = self._base()
            return self._held
        self._held = self._publish(*version_at(self._state, step, self._every))
        return self._held

    def after(self, step: int) -> Weights | None:
        """The policy after `step` steps, if the samplers are to have it and have it not."""
        if self._every is None or step % self._every or step == self.held.version:
            return None
        self._held = self._publish(step, None)
        return self._held

    def lend(self, step: int) -> Weights:
        """The policy after `step` steps, beside what is held. What was lent before is removed."""
        if self._lent is not None:
            self._folder.drop(self._lent)
        self._lent = step
        return self._publish(step, None)

    def _base(self) -> Weights:
        """Version 0, whatever the policy has become. Over an adapter: one that adds nothing."""
        trained = trained_parameters(self._state.policy)
        if self._adapter:
            nothing = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
            return self._folder.publish_adapter(self._state.policy, nothing, 0)
        assert self._base_dir is not None, "a run whose samplers keep the base model says where it lies"
        base = load_model(self._base_dir)
        return self._folder.publish(base, merged_state(base), 0, self._dtype)

    def drop_before(self, version: int) -> None:
        self._folder.drop_before(version)

    def close(self) -> None:
        self._folder.remove()

    def _publish(self, version: int, instead: dict[str, Tensor] | None) -> Weights:
        """`instead` of the trained parameters, by their names in the policy."""
        policy = self._state.policy
        trained = dict(trained_parameters(policy))
        if self._adapter:
            return self._folder.publish_adapter(policy, instead or trained, version)
        state = merged_state(policy)
        if instead is not None:
            places = {parameter.data_ptr(): name for name, parameter in trained.items()}
            state = {name: instead[places[t.data_ptr()]] if t.data_ptr() in places else t for name, t in state.items()}
        return self._folder.publish(policy, state, version, self._dtype)


def version_at(state: TrainState, step: int, every: int) -> tuple[int, dict[str, Tensor] | None]:
    """The newest version the samplers may have at step number `step`, and what of the policy's parameters it has other
    values for: within an iteration all of them, those of the reference."""
    version = step - step % every
    return version, state.moving.weights if state.moving is not None and version != step else None
