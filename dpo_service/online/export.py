"""A trainer's weights on their way to the samplers: which version when, and from where in the training state.

every step        the policy after step v is version v
every iteration   the policy at its end, which is the reference from there on; so a run that is resumed within an
                  iteration samples from its reference, which is in the checkpoint
never             the samplers keep the base model
"""

from __future__ import annotations

from torch import Tensor

from dpo_service.online.port import Weights
from dpo_service.online.weights import WeightsFolder
from dpo_service.train.optim import trained_parameters
from dpo_service.train.policy import base_of, merged_state
from dpo_service.train.step import TrainState

BYTES = {"float32": 4, "bfloat16": 2}


class Exporter:
    """Writes versions for samplers on the same machine. `close` removes them."""

    def __init__(self, state: TrainState, dtype: str, sync_every: int) -> None:
        """`dtype` is that of the samplers' weights, `sync_every` in steps."""
        self._state, self._dtype, self._every = state, dtype, sync_every
        self._adapter = base_of(state.policy) is not state.policy
        count = sum(parameter.numel() for parameter in trained_parameters(state.policy).values())
        self._folder = WeightsFolder(count * (4 if self._adapter else BYTES[dtype]))

    def first(self, step: int) -> Weights:
        """What step number `step` is sampled from at the latest, when a run begins there."""
        version = step - step % self._every
        moving = self._state.moving
        return self._publish(version, moving.weights if moving is not None and version != step else None)

    def after(self, step: int) -> Weights | None:
        """The policy after `step` steps, if the samplers are to have it."""
        return None if step % self._every else self._publish(step, None)

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
