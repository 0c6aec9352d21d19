"""Several samplers as one.

    sample ── chunks ──> [ free slots, in the order they became free ] ──> a sampler ── lost? ──> the chunk goes to
                            ^                                                 │                   the next free slot
                            └───── answered ──────────────────────────────────┤
                            └───── its slots come back once it is restarted and has the newest weights

A slot is room for one chunk at one sampler, so whoever asks for more waits here. Nothing sleeps and nothing polls: a
free slot wakes the first who waits, and the death of the last sampler wakes them all.

Weights of kind `device` cannot be pushed from here: a sampler that was restarted says what it lacks (`on_lacking`) and
waits, without slots, for the trainer's next transfer, which it is part of.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from dpo_service.errors import SamplerLost, TrainingError, WeightsRefused
from dpo_service.online.port import Sample, SamplePrompt, Sampler, Synced, Weights
from dpo_service.online.together import all_of
from dpo_service.specs.sampling import SamplingSpec

log = logging.getLogger(__name__)

SLOTS = 2
"""Chunks at one sampler: one is sampled while the next one is on its way."""
TRIES = 4
"""A chunk that so many samplers died of is the fault of the chunk."""


@dataclass
class Member:
    sampler: Sampler
    version: int
    """That it has said it has."""
    revive: Callable[[], Awaitable[None]]
    """Wait until a sampler that died is there again; raises SamplerLost when it will not be."""
    life: int = 1
    lost: bool = False
    """It died, and is not there again yet."""
    gone: bool = False
    """... and will not be."""

    def __post_init__(self) -> None:
        self.weights = asyncio.Lock()
        """One change of its weights at a time: a sync, or what follows a restart."""
        self.back = asyncio.Event()


@dataclass
class PoolCounts:
    """Since the start; for metrics."""

    lost: int = 0
    """Deaths of samplers."""
    retried: int = 0
    """Prompts that were asked again because of them."""


class SamplerPool:
    """A Sampler made of others."""

    def __init__(self, members: Sequence[Member], *, chunk: int, slots: int = SLOTS) -> None:
        """`chunk` prompts are asked of a sampler at a time."""
        self.counts = PoolCounts()
        self.members = list(members)
        self._chunk = chunk
        self._newest: Weights | None = None
        self.on_lacking: Callable[[], Awaitable[None]] | None = None
        """Called where a sampler is there again and lacks weights that only a transfer brings."""
        self._transferred = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._free: asyncio.Queue[Member | None] = asyncio.Queue()
        for _ in range(slots):
            for member in self.members:
                self._free.put_nowait(member)

    async def version(self) -> int:
        """That all of them have, or are about to have after a restart."""
        return self._newest.version if self._newest else min(member.version for member in self.members)

    async def sample(self, prompts: Sequence[SamplePrompt], options: SamplingSpec) -> list[tuple[Sample, ...]]:
        starts = range(0, len(prompts), self._chunk)
        answers = await all_of(self._answers(prompts[start : start + self._chunk], options) for start in starts)
        return [answer for chunk in answers for answer in chunk]

    async def _answers(self, prompts: Sequence[SamplePrompt], options: SamplingSpec) -> list[tuple[Sample, ...]]:
        for _ in range(TRIES):
            answers = await self._asked(await self._slot(), prompts, options)
            if answers is not None:
                return answers
            self.counts.retried += len(prompts)
        raise TrainingError(
            f"{TRIES} samplers died of the same prompts, the first of {len(prompts[0].token_ids)} tokens"
        )

    async def _asked(
        self, member: Member, prompts: Sequence[SamplePrompt], options: SamplingSpec
    ) -> list[tuple[Sample, ...]] | None:
        """What `member` answers, or None where it died; its slot comes back either way."""
        expected, life = member.version, member.life
        try:
            answers = await member.sampler.sample(prompts, options)
            if any(sample.version < expected for answer in answers for sample in answer):
                raise SamplerLost("it was restarted, and has its first weights")
        except SamplerLost as error:
            self._lose(member, life, error)
            self._in_background(self._give_back(member))
            return None
        except BaseException:
            self._free.put_nowait(member)
            raise
        self._free.put_nowait(member)
        return answers

    async def _slot(self) -> Member:
        while True:
            member = await self._free.get()
            if member is None:
                self._free.put_nowait(None)  # for the next one who waits
                raise SamplerLost("all samplers have died, and may not be restarted any more")
            if not member.lost:
                return member
            self._in_background(self._give_back(member))

    async def _give_back(self, member: Member) -> None:
        """Give back a slot of `member`, once it is there."""
        if member.lost:
            await member.back.wait()
        if not member.gone:
            self._free.put_nowait(member)
        elif all(other.gone for other in self.members):
            self._free.put_nowait(None)

    def _lose(self, member: Member, life: int, error: SamplerLost) -> None:
        """`member` died in its life number `life`; what else hears of it later is not another death."""
        if member.life != life:
            return
        member.life += 1
        member.lost = True
        member.back.clear()
        self.counts.lost += 1
        log.warning("a sampler was lost: %s", error.message)
        self._in_background(self._bring_back(member))

    async def _bring_back(self, member: Member) -> None:
        async with member.weights:
            try:
                await member.revive()
                member.version = await member.sampler.version()
                await self._catch_up(member)
                member.lost = False
            except TrainingError as error:
                member.gone = True
                log.error("a sampler is gone: %s", error.message)
        member.back.set()

    async def _catch_up(self, member: Member) -> None:
        while self._newest is not None and member.version != self._newest.version:
            if self._newest.kind != "device":
                member.version = (await member.sampler.sync(self._newest)).version
                continue
            transferred = self._transferred
            if self.on_lacking is not None:
                await self.on_lacking()
            await transferred.wait()
            member.version = await member.sampler.version()

    async def sync(self, weights: Weights) -> Synced:
        """All samplers at once. One that dies of it gets them when it is back."""
        started, before = time.monotonic(), self._newest
        self._newest = weights
        if weights.kind == "device":
            self._transferred.set()
            self._transferred = asyncio.Event()
        try:
            done = await all_of(self._synced(member, weights) for member in self.members)
        except WeightsRefused:
            self._newest = before
            raise
        paused = max((one.paused for one in done if one is not None), default=0.0)
        return Synced(weights.version, time.monotonic() - started, paused)

    async def _synced(self, member: Member, weights: Weights) -> Synced | None:
        if member.lost and weights.kind == "device":
            return None  # it waits for a transfer, and looks itself whether it was part of this one
        async with member.weights:
            if member.lost:
                return None
            life = member.life
            try:
                done = await member.sampler.sync(weights)
            except SamplerLost as error:
                self._lose(member, life, error)
                return None
            member.version = done.version
            return done

    async def sleep(self) -> None:
        await all_of(self._told(member, member.sampler.sleep) for member in self.members)

    async def wake(self) -> None:
        await all_of(self._told(member, member.sampler.wake) for member in self.members)

    async def _told(self, member: Member, what: Callable[[], Awaitable[None]]) -> None:
        if member.lost:
            return
        life = member.life
        try:
            await what()
        except SamplerLost as error:
            self._lose(member, life, error)

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(*(member.sampler.close() for member in self.members))

    def _in_background(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
