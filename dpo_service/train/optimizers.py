"""AdamW (arXiv 1711.05101) in less memory: weights and moments in fewer bits, or moments in the host's memory.

    bytes a weight           weights  gradient  moments
    adamw, float32                 4         4        8
    adamw, pure bfloat16           2         2        4
    adamw_8bit                4 or 2    4 or 2        2
    adamw_offload             4 or 2    4 or 2        0    and 12 in the host's memory

Rounding to the nearest loses every change smaller than half the spacing of the numbers: in bfloat16 half a percent of
a weight, where a step changes it by a thousandth of that, and a second moment (which moves by a thousandth a step)
never moves. Whatever is kept in fewer bits is therefore rounded up or down at random, so that its expectation is the
float32 value (stochastic rounding, arXiv 1502.02551, 2010.06192). The random numbers are a function of (seed, step,
position of the parameter): the same on every rank, and after a resume. Of a sharded parameter a rank moves the rows it
holds, and its random numbers are its own.

Shapes: N numbers of a parameter (of a sharded one: of this rank's rows), flat; K of them in blocks of `BLOCK`, one row
a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

BLOCK = 256
MIN_QUANTISED = 4096
"""Smaller parameters (norms, biases) keep float32 moments: they take no memory, and are the most sensitive."""
SLAB = 2**24
"""Numbers that are float32 at one time: 64 MB of each kind."""

State = dict[str, Tensor]


class CompactAdamW(torch.optim.Optimizer):
    """AdamW whose arithmetic is float32, over weights of any type and moments in the weights' type, or in 8 bits."""

    def __init__(self, groups: list[dict[str, Any]], *, eight_bit: bool, seed: int, **defaults: Any) -> None:
        super().__init__(groups, defaults)
        self._eight_bit, self._seed = eight_bit, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._move(parameter, group, place)

    def _move(self, parameter: nn.Parameter, group: dict[str, Any], place: int) -> None:
        state: State = self.state[parameter]
        if not state:
            state |= self._fresh(parameter)
        state["step"] += 1
        step = int(state["step"])
        random = torch.Generator(parameter.device).manual_seed(_seed(self._seed, step, place, *_shard(parameter)))
        assert parameter.grad is not None
        weight_N, grad_N = _flat(parameter.detach()), _flat(parameter.grad)
        for start in range(0, weight_N.numel(), SLAB):
            part = slice(start, min(start + SLAB, weight_N.numel()))
            first = _read(state, "exp_avg", part)
            second = _read(state, "exp_avg_sq", part)
            moved = _adamw(weight_N[part].float(), grad_N[part].float(), first, second, group, step)
            _put(weight_N, part, moved, random)
            _write(state, "exp_avg", part, first, random)
            _write(state, "exp_avg_sq", part, second, random)

    def _fresh(self, parameter: nn.Parameter) -> State:
        state = {"step": torch.zeros(())}
        for slot in ("exp_avg", "exp_avg_sq"):
            if self._eight_bit and parameter.numel() >= MIN_QUANTISED:
                blocks = -(-parameter.numel() // BLOCK)
                state[slot] = torch.zeros(parameter.numel(), dtype=torch.uint8, device=parameter.device)
                state[f"{slot}_top"] = torch.zeros(blocks, dtype=torch.int16, device=parameter.device)
            else:
                dtype = torch.float32 if self._eight_bit else parameter.dtype
                state[slot] = torch.zeros_like(parameter, dtype=dtype)
        return state


def _adamw(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, group: dict[str, Any], step: int) -> Tensor:
    """The new weight; the moments are moved in place."""
    beta1, beta2 = group["betas"]
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    spread = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    decayed = weight * (1 - group["lr"] * group["weight_decay"])
    moved: Tensor = decayed.addcdiv_(first, spread, value=-group["lr"] / (1 - beta1**step))
    return moved


def _flat(tensor: Tensor) -> Tensor:
    """Its numbers that lie here, [N]: those of this rank, of a sharded one."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def _shard(tensor: Tensor) -> tuple[int, ...]:
    """Which part of it lies here; () = all."""
    return tuple(tensor.device_mesh.get_coordinate() or ()) if isinstance(tensor, DTensor) else ()


def _seed(*place: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=7).digest())


def _read(state: State, slot: str, part: slice) -> Tensor:
    """A copy, float32."""
    codes_N = _flat(state[slot])[part]
    if codes_N.dtype == torch.uint8:
        return decode(codes_N, state[f"{slot}_top"][_blocks(part)], GRIDS[slot])
    return codes_N.to(torch.float32, copy=True)


def _write(state: State, slot: str, part: slice, value_N: Tensor, random: torch.Generator) -> None:
    if state[slot].dtype == torch.uint8:
        state[slot][part], state[f"{slot}_top"][_blocks(part)] = encode(value_N, GRIDS[slot], random)
    else:
        _put(_flat(state[slot]), part, value_N, random)


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _put(target_N: Tensor, part: slice, value_N: Tensor, random: torch.Generator) -> None:
    target_N[part] = round_randomly(value_N, random) if target_N.dtype == torch.bfloat16 else value_N


def round_randomly(value: Tensor, random: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with the chances that make the expectation `value`."""
    bits = value.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=random)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class Grid(NamedTuple):
    """Which numbers 8 bits can say: 2^(j / per_octave) for the `levels` values of j up to a block's top, and 0.

    The grid itself never moves with a block's scale, so a number that changes little is seldom rounded anew.
    """

    per_octave: int
    levels: int
    signed: bool


GRIDS = {"exp_avg": Grid(6, 127, True), "exp_avg_sq": Grid(8, 255, False)}
"""Spacings of 12% and 9% over 21 and 32 octaves. bitsandbytes' and the paper's grid (arXiv 2110.02861) rounds the
second moments that are small in their block to 0, which makes their weights' steps enormous; here the least level
stands in for them, which makes the steps smaller."""


def encode(value_N: Tensor, grid: Grid, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes [N], uint8, and the exponents of the blocks' tops, int16; rounded randomly, unbiased above the least."""
    value_KB = nn.functional.pad(value_N, (0, -value_N.numel() % BLOCK)).view(-1, BLOCK)
    place_KB = value_KB.abs().clamp_min(torch.finfo(torch.float32).tiny).log2_().mul_(grid.per_octave)
    top_K1 = place_KB.amax(1, keepdim=True).ceil_()
    low_KB = place_KB.floor()
    step = 2 ** (1 / grid.per_octave) - 1
    chance_KB = ((place_KB - low_KB).div_(grid.per_octave).exp2_() - 1).div_(step)
    level_KB = low_KB.add_(torch.rand(chance_KB.shape, device=chance_KB.device, generator=random) < chance_KB)
    code_KB = level_KB.sub_(top_K1).add_(grid.levels).clamp_(max=grid.levels)
    code_KB = code_KB.clamp_(min=0 if grid.signed else 1).masked_fill_(value_KB == 0, 0)
    if grid.signed:
        code_KB += 128 * (value_KB < 0)
    return code_KB.view(-1)[: value_N.numel()].to(torch.uint8), top_K1.squeeze(1).to(torch.int16)


def decode(code_N: Tensor, top_K: Tensor, grid: Grid) -> Tensor:
    """What `encode` kept, [N] float32."""
    code_KB = nn.functional.pad(code_N, (0, -code_N.numel() % BLOCK)).view(-1, BLOCK)
    level_KB = (code_KB & 127 if grid.signed else code_KB).float()
    value_KB = level_KB.add(top_K[:, None] - grid.levels).div_(grid.per_octave).exp2_().masked_fill_(level_KB == 0, 0)
    if grid.signed:
        value_KB = torch.where(code_KB > 127, -value_KB, value_KB)
    return value_KB.view(-1)[: code_N.numel()]


class OffloadedAdamW(torch.optim.Optimizer):
    """torch's fused AdamW on the host: moments, and float32 weights to move, in its memory.

    On a device a step copies every gradient out and every weight back, over pinned memory. Weights that lie on the host
    in float32 are moved where they are, which is plain AdamW to the bit. Weights in another type have float32 masters,
    which are part of the state; they come out rounded to the nearest.
    """

    home = torch.device("cpu")
    """Where the state lies."""

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, defaults)
        self._masters: dict[nn.Parameter, Tensor] = {}
        self._pinned: dict[nn.Parameter, Tensor] = {}
        """Where gradients of a device arrive."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        gradients = {p: self._fetch(p) for group in self.param_groups for p in group["params"] if p.grad is not None}
        for device in {parameter.device for parameter in gradients if parameter.is_cuda}:
            torch.cuda.synchronize(device)
        for group in self.param_groups:
            self._move({p: gradients[p].float() for p in group["params"] if p in gradients}, group)
        for parameter in gradients:
            if (master := self._masters[parameter]).data_ptr() != parameter.data_ptr():
                parameter.copy_(master, non_blocking=True)

    def _fetch(self, parameter: nn.Parameter) -> Tensor:
        """Its gradient on the host, there once the device has been waited for; makes its state where it has none."""
        assert parameter.grad is not None
        if parameter not in self._masters:
            self._masters[parameter] = self._master(parameter)
        if not parameter.is_cuda:
            return parameter.grad
        if parameter not in self._pinned:
            self._pinned[parameter] = torch.empty(parameter.shape, dtype=parameter.grad.dtype, pin_memory=True)
        return self._pinned[parameter].copy_(parameter.grad, non_blocking=True)

    def _master(self, parameter: nn.Parameter) -> Tensor:
        state: State = self.state[parameter]
        if "step" not in state:
            moments = {slot: torch.zeros(parameter.shape) for slot in ("exp_avg", "exp_avg_sq")}
            state |= {"step": torch.zeros(()), **moments}
        if parameter.dtype == torch.float32 and not parameter.is_cuda:
            return parameter.detach()
        master = state.get("master", parameter.detach()).to(self.home, torch.float32, copy=True)
        if parameter.is_cuda:
            master = master.pin_memory()
        if parameter.dtype != torch.float32:
            state["master"] = master
        return master

    def _move(self, gradients: dict[nn.Parameter, Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in gradients]
        beta1, beta2 = group["betas"]
        adamw(
            [self._masters[parameter] for parameter in gradients],
            list(gradients.values()),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
