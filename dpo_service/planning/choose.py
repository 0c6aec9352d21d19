"""The strategy and the micro-batch that a job is best run with on a device, and what would make it fit where it does
not. Nothing is said to help that was not tried on the model of memory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dpo_service.planning.gpus import DEVICES, Device
from dpo_service.planning.memory import Memory, Recipe, Strategy, memory
from dpo_service.planning.shape import ModelShape
from dpo_service.planning.speed import Speed, speed
from dpo_service.planning.workload import Lengths, Workload, workload

BUDGETS = (32_768, 16_384, 8_192, 4_096, 2_048, 1_024, 512)
"""Tokens of a micro-batch that are tried where the choice is ours."""
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp")
MOST_WORKERS = 1024
SHORTEST = 128
ADAPTER_RANK = 16


@dataclass(frozen=True)
class Question:
    """A job on a device. `recipe` holds what is decided; the flags say what is not."""

    shape: ModelShape
    recipe: Recipe
    lengths: Lengths
    batch_size: int
    max_length: int
    device: Device
    rows: int
    """Rows of a micro-batch, at most."""
    tokens: int | None
    """Tokens of a micro-batch, at most; None = ours to choose."""
    strategies: tuple[Strategy, ...] = ("ddp",)
    checkpointing: tuple[bool, ...] = (False,)
    """What may be chosen."""
    shards: bool = True
    """Whether fsdp can be had."""
    cores: int = 1


@dataclass(frozen=True)
class Choice:
    """One way to run it, and what that takes."""

    recipe: Recipe
    tokens: int
    work: Workload
    memory: Memory
    speed: Speed

    def fits(self, device: Device) -> bool:
        return not device.memory or self.memory.total <= device.usable


@dataclass(frozen=True)
class Fix:
    """A change under which the job fits."""

    change: dict[str, Any]
    """Fields of the job, by their paths."""
    text: str
    choice: Choice


def choose(question: Question) -> Choice:
    """The fastest way that fits; where none does, the one that needs the least memory."""
    choices = list(_choices(question))
    fitting = [choice for choice in choices if choice.fits(question.device)]
    if fitting:
        return min(fitting, key=lambda choice: (round(choice.speed.step, 4), choice.memory.total))
    return min(choices, key=lambda choice: choice.memory.total)


def _choices(question: Question) -> Iterator[Choice]:
    workers = question.recipe.workers
    for tokens in (question.tokens,) if question.tokens else BUDGETS:
        work = workload(
            question.lengths, question.batch_size, workers, question.rows, tokens, packed=question.shape.packs
        )
        for strategy in question.strategies if workers > 1 and question.shards else ("ddp",):
            for checkpointing in question.checkpointing:
                recipe = replace(
                    question.recipe,
                    strategy=strategy,
                    checkpointing=checkpointing,
                    accumulates=work.micro_batches > 1,
                )
                found = memory(question.shape, recipe, work.largest)
                yield Choice(
                    recipe, tokens, work, found, speed(question.shape, recipe, work, question.device, question.cores)
                )


Change = tuple[dict[str, Any], str, Question]


Step = Callable[[Question], Change | None]


def fixes(question: Question) -> list[Fix]:
    """Single changes that make it fit; where none does alone, the shortest piles of them that do: one that spreads the
    model over more devices, one that trains less of it."""
    alone = [fix for change in _changes(question) if (fix := _tried(change))]
    if alone:
        return alone
    free: tuple[Step, ...] = (_checkpointed, _small_micro_batch, _cached)
    piles = [_piled(question, (*free, _sharded, _adapter)), _piled(question, (*free, _adapter, _four_bits, _larger))]
    return list({fix.text: fix for fix in piles if fix}.values())


def _tried(change: Change) -> Fix | None:
    fields, text, question = change
    choice = choose(question)
    return Fix(fields, text, choice) if choice.fits(question.device) else None


def _piled(question: Question, steps: tuple[Step, ...]) -> Fix | None:
    fields: dict[str, Any] = {}
    texts = []
    for step in steps:
        change = step(question)
        if change is None:
            continue
        fields, question = fields | change[0], change[2]
        texts.append(change[1])
        if fix := _tried((fields, "; and ".join(texts), question)):
            return fix
    return None


def _changes(question: Question) -> Iterator[Change]:
    steps: tuple[Step, ...] = (
        _checkpointed, _small_micro_batch, _cached, _small_moments, _adapter, _four_bits, _sharded, _shorter, _larger,
    )  # fmt: skip
    for step in steps:
        if change := step(question):
            yield change


def _checkpointed(question: Question) -> Change | None:
    if True in question.checkpointing:
        return None
    text = "set activation_checkpointing to true (up to a third more arithmetic)"
    return {"activation_checkpointing": True}, text, replace(question, checkpointing=(True,))


def _small_micro_batch(question: Question) -> Change | None:
    if question.rows == 1 or (question.tokens is None):
        return None
    return {"micro_batch_size": 1}, "set micro_batch_size to 1", replace(question, rows=1)


def _cached(question: Question) -> Change | None:
    if question.recipe.reference != "live" or question.recipe.lora_rank:
        return None
    changed = replace(question, recipe=replace(question.recipe, reference="cached"))
    return {"reference": "cached"}, "set reference to cached", changed


def _small_moments(question: Question) -> Change | None:
    recipe = question.recipe
    if recipe.optimizer != "adamw" or recipe.lora_rank or not recipe.cuda or question.strategies == ("fsdp",):
        return None
    changed = replace(question, recipe=replace(question.recipe, optimizer="adamw_8bit"))
    return {"optimizer": "adamw_8bit"}, "set optimizer to adamw_8bit", changed


def _adapter(question: Question) -> Change | None:
    if question.recipe.lora_rank:
        return None
    changed = replace(question, recipe=replace(question.recipe, lora_rank=ADAPTER_RANK))
    return {"lora": {"rank": ADAPTER_RANK}}, f"train a LoRA adapter (lora: {{rank: {ADAPTER_RANK}}})", changed


def _four_bits(question: Question) -> Change | None:
    """An adapter over a base of 4 bits, whose reference is that base and never cached."""
    recipe = question.recipe
    if recipe.four_bits or not recipe.cuda or question.shape.experts or question.strategies == ("fsdp",):
        return None
    rank, reference = recipe.lora_rank or ADAPTER_RANK, recipe.reference if recipe.reference == "none" else "live"
    changed = replace(question, recipe=replace(recipe, lora_rank=rank, four_bits=True, reference=reference))
    fields: dict[str, Any] = {"lora": {"rank": rank, "quantize": "nf4"}}
    if recipe.reference == "cached":
        fields["reference"] = "auto"
    return fields, "train an adapter over a base of 4 bits (lora.quantize: nf4)", replace(changed, shards=False)


def _sharded(question: Question) -> Change | None:
    """The fewest workers over which it fits, doubling; the batch grows where it is smaller than their number."""
    workers, most = question.recipe.workers, min(MOST_WORKERS, len(question.lengths))
    if not question.recipe.cuda or workers >= most or not question.shards:
        return None
    if question.strategies == ("fsdp",) or workers == 1:
        workers = 2 * workers
    for doubled in range(most.bit_length()):
        number = min(workers << doubled, most)
        recipe = replace(question.recipe, workers=number)
        batch = max(question.batch_size, number)
        changed = replace(question, recipe=recipe, batch_size=batch, strategies=("fsdp",))
        if number == most or choose(changed).fits(question.device):
            break
    fields = {"resources.strategy": "fsdp", "resources.workers": number}
    if changed.batch_size > question.batch_size:
        fields |= {"batch_size": changed.batch_size}
    return fields, f"shard it over {number} GPUs (strategy fsdp)", changed


def _shorter(question: Question) -> Change | None:
    """The longest half, quarter, ... of max_length with which it fits."""
    length = question.max_length // 2
    while length >= SHORTEST:
        changed = replace(question, lengths=question.lengths.within(length), max_length=length)
        if choose(changed).fits(question.device):
            return {"max_length": length, "truncation": "cut"}, f"cut rows at max_length {length:,}", changed
        length //= 2
    return None


def _larger(question: Question) -> Change | None:
    """The smallest device that it fits on."""
    if not question.device.cuda:
        return None
    larger = [device for device in DEVICES.values() if device.memory > question.device.memory]
    for device in sorted(larger, key=lambda device: device.memory):
        changed = replace(question, device=device)
        if choose(changed).fits(device):
            return {}, f"use a {device.name}", changed
    return None
