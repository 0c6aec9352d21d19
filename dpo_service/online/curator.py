"""Everything of online training that is not the trainer: prompts in, the pairs of each step out.

    a task makes step s as soon as  s <= asked + staleness       room: at most staleness + 1 steps lie ready
                                    a version >= required(s)     the samplers have weights that are new enough
        position ──> prompts ──> sampler ──> source (judge) ──> pairs ──> ready[s] ──> whoever waits in `pairs(s)`
    another gives the samplers the newest weights that were published

Samplers that share the trainer's device are woken to make a step's pairs, or to take an adapter, and sleep again before
the pairs are handed out, since then the trainer trains.

What unblocks each part: `pairs(s)` waits for the first task; the first for `pairs` or for a sync; the second for
`published`; one condition wakes them all. Nothing sleeps. An error in either task is raised by everyone who waits.

    evaluate(s)   waits for version s, and asks the held-out prompts beside what is asked for training
    lent weights  are those of an evaluation where the samplers follow more slowly than step by step: from when they are
                  published until the ones to train on are back, nothing is sampled to train on

What an evaluation samples has seeds, verdicts and counts of its own, so training is the same with it as without.

Version v is the policy after v steps. Which prompts a step asks, and their seeds, are functions of the seed and the
position, and positions are part of every step's counters: so a resumed run asks what the unbroken one would have.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dpo_service.clock import monotonic
from dpo_service.errors import TrainingError
from dpo_service.online.evaluation import Evaluation, HeldOut
from dpo_service.online.judges.guard import WindowGuard
from dpo_service.online.judges.port import Answer
from dpo_service.online.port import Sample, SamplePrompt, Sampler, Weights, seed_of
from dpo_service.online.prompts import PromptRow
from dpo_service.online.sources import Source, pair_row
from dpo_service.online.steps import PairRow, Prompts, SampleWriter, StepPairs, StepStats, Turn
from dpo_service.online.together import all_of
from dpo_service.specs.sampling import SamplingSpec

STALE = "stale"


@dataclass(frozen=True)
class CuratorPlan:
    """How many, how old, how often: every number decided."""

    total_steps: int
    pairs_per_step: int
    seed: int
    staleness: int = 1
    """Step s trains on samples of version s - staleness or newer; 0 = strictly on-policy."""
    sync_every: int | None = 1
    """Steps between two syncs of the samplers; None = they keep the initial policy."""
    chunk: int = 8
    """Prompts asked of the sampler in one call; each is judged as soon as its chunk is there."""
    takes_turns: bool = False
    """Samplers and trainer share a device; staleness is then 0."""

    def required(self, step: int) -> int:
        """The oldest version whose samples step `step` may train on."""
        if self.sync_every is None:
            return 0
        allowed = max(0, step - self.staleness)
        return allowed - allowed % self.sync_every


class Curator:
    """Belongs to one event loop. `start` may be called again, after the trainer was restarted."""

    def __init__(
        self,
        plan: CuratorPlan,
        prompts: Prompts,
        sampler: Sampler,
        source: Source,
        options: SamplingSpec,
        decode: Callable[[Sequence[int]], str],
        samples: SampleWriter | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        """`decode` makes an answer's text, for judges: without special tokens. `held_out` are asked by `evaluate`; its
        judge is closed with the source's."""
        self._plan, self._prompts, self._sampler, self._source = plan, prompts, sampler, source
        self._options, self._decode, self._samples, self._held_out = options, decode, samples, held_out
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._evaluations: dict[int, asyncio.Task[Evaluation]] = {}
        self._error: BaseException | None = None
        self._begin_at(0, {})

    def _begin_at(self, step: int, counters: Mapping[str, Any]) -> None:
        self._version, self._asked, self._synced_in = 0, step, 0.0
        self._pending: tuple[Weights, bool] | None = None
        self._making = self._lent = False
        self._lacking, self._asked_for = False, dict[int, int]()
        self._ready: dict[int, StepPairs] = {}
        self._leftover: deque[PairRow] = deque()
        self._position = int(counters.get("position", 0))
        self._guard = WindowGuard()
        self._guard.resume(counters.get("guard", ()))

    async def start(self, step: int, weights: Weights | None, counters: Mapping[str, Any]) -> None:
        """Make pairs for step number `step`, from 0, and those after it. `weights` are given to the samplers first;
        None = they have the version that is needed. `counters` are those of the step before, from a checkpoint.

        Raises:
            TrainingError: the samplers could not take the weights.
        """
        await self._stop_tasks()
        self._begin_at(step, counters)
        self._error = None
        if weights is not None:
            self._version = (await self._sampler.sync(weights)).version
        self._tasks = [asyncio.create_task(self._guarded(work)) for work in (self._make(step), self._sync())]

    async def pairs(self, step: int, sent: int = 0) -> StepPairs | None:
        """The pairs of step `step`; returns when there are enough. May be asked again until the next step is.

        None: a sampler lacks weights that only the trainer can send. It is to send them, on all ranks, and ask again
        with `sent`, how often it has done so for this step, one higher. Every rank is answered alike.

        Raises:
            TrainingError: the sampler or the judge has failed for good; too few prompts gave a pair.
        """
        async with self._changed:
            self._asked = max(self._asked, step)
            self._changed.notify_all()
            await self._changed.wait_for(partial(self._may_answer, step, sent))
            if sent < self._asked_for.get(step, 0):
                return None
            if step not in self._ready:
                self._raise()
                self._lacking, self._asked_for[step] = False, sent + 1
                return None
            for done in [one for one in self._ready if one < step - 1]:
                del self._ready[done]
            return self._ready[step]

    def _may_answer(self, step: int, sent: int) -> bool:
        known = step in self._ready or self._error is not None or self._lacking
        return known or sent < self._asked_for.get(step, 0)

    async def lacking(self) -> None:
        """A sampler lacks weights that only the trainer can send: it is asked for them when it asks for pairs."""
        async with self._changed:
            self._lacking = True
            self._changed.notify_all()

    async def published(self, weights: Weights, lent: bool = False) -> None:
        """Newer weights are there. Returns at once: the samplers take them when their answers under way have ended.
        That they could not is raised by the next `pairs`, which every rank of the trainer asks.

        `lent` ones are to be evaluated only; publish after it, not lent, those that training samples come from."""
        async with self._changed:
            self._pending = weights, lent
            self._lent = self._lent or lent
            if not lent:
                self._asked = max(self._asked, weights.version)
            self._changed.notify_all()

    async def evaluate(self, step: int) -> Evaluation:
        """The held-out prompts, answered by version `step`, which was published last. Every rank may ask; it is done
        once.

        Raises:
            TrainingError: the sampler or the judge has failed for good.
        """
        if step not in self._evaluations:
            self._evaluations = {step: asyncio.create_task(self._evaluated(step))}
        return await asyncio.shield(self._evaluations[step])

    async def _evaluated(self, step: int) -> Evaluation:
        assert self._held_out is not None, "the dataset has a validation split"
        async with self._changed:
            await self._changed.wait_for(lambda: self._version == step or self._error is not None)
            self._raise()
        try:
            return await self._held_out.evaluate(self._sampler)
        except TrainingError:
            raise
        except Exception as error:
            raise _told(error) from error

    async def close(self) -> None:
        """End all work, the samplers and the judge."""
        await self._stop_tasks()
        try:
            await self._source.close()
        finally:
            await self._sampler.close()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    async def _stop_tasks(self) -> None:
        tasks = [*self._tasks, *self._evaluations.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks, self._evaluations = [], {}

    async def _guarded(self, work: Any) -> None:
        """Do `work`; what it fails of is everybody's."""
        try:
            await work
        except asyncio.CancelledError:
            raise
        except Exception as error:
            async with self._changed:
                self._error = error if isinstance(error, TrainingError) else _told(error)
                self._changed.notify_all()

    async def _sync(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(self._may_sync)
                assert self._pending is not None
                (weights, lent), self._pending = self._pending, None
                self._lacking = False  # who still lacks them will say so again
            if self._plan.takes_turns and weights.kind != "device":
                await self._sampler.wake()
            synced = await self._sampler.sync(weights)
            async with self._changed:
                self._version = synced.version
                self._synced_in += 0.0 if self._lent else synced.seconds
                self._lent = lent
                self._changed.notify_all()

    def _may_sync(self) -> bool:
        return self._pending is not None and not (self._lent and self._making)

    async def _make(self, step: int) -> None:
        while step < self._plan.total_steps:
            async with self._changed:
                await self._changed.wait_for(partial(self._may_make, step))
                self._making = True
            made = await self._in_turn(step)
            async with self._changed:
                self._making = False
                if self._error is not None:  # whoever asked for this step was told so
                    return
                self._ready[step] = made
                self._changed.notify_all()
            step += 1

    async def _in_turn(self, step: int) -> StepPairs:
        if not self._plan.takes_turns:
            return await self._step(step)
        await self._sampler.wake()
        made = await self._step(step)
        await self._sampler.sleep()
        return made

    def _may_make(self, step: int) -> bool:
        ahead, newest = self._asked + self._plan.staleness, self._version
        return not self._lent and step <= ahead and newest >= self._plan.required(step)

    async def _step(self, step: int) -> StepPairs:
        stats, turns = StepStats(steps=1), list[Turn]()
        pairs = self._fresh_leftover(step, stats)
        while (missing := self._plan.pairs_per_step - len(pairs)) > 0:
            for turn in await self._turns(range(self._position, self._position + missing), step, stats):
                turns.append(turn)
                pairs += turn.pairs
                stats.note(turn)
                self._guard.note(turn.dropped)
            self._position += missing
        rows, self._leftover = pairs[: self._plan.pairs_per_step], deque(pairs[self._plan.pairs_per_step :])
        if self._samples is not None:
            await self._samples.write(step, tuple(turns))
        return self._told_of(step, tuple(rows), stats)

    def _told_of(self, step: int, rows: tuple[PairRow, ...], stats: StepStats) -> StepPairs:
        stats.pairs = len(rows)
        current = step if self._plan.sync_every is not None else 0
        stats.versions_behind = sum(max(0, current - row.version) for row in rows)
        stats.judge = self._source.sums()
        stats.sync_seconds, self._synced_in = self._synced_in, 0.0
        untrained = [row.position for row in self._leftover if row.position > rows[-1].position]
        counters = {"position": min([*untrained, self._position]), "guard": self._guard.counters()}
        return StepPairs(step, rows, self._version, stats, counters)

    def _fresh_leftover(self, step: int, stats: StepStats) -> list[PairRow]:
        fresh = [row for row in self._leftover if row.version >= self._plan.required(step)]
        stats.stale += len(self._leftover) - len(fresh)
        return fresh

    async def _turns(self, positions: range, step: int, stats: StepStats) -> list[Turn]:
        """Ask the prompts at `positions`; their turns in this order."""
        clock = _Clock()
        starts = range(0, len(positions), self._plan.chunk)
        chunks = [positions[start : start + self._plan.chunk] for start in starts]
        turns = await all_of(self._chunk(chunk, step, clock) for chunk in chunks)
        stats.sample_seconds += clock.sample_seconds
        stats.judge_seconds += clock.judge_seconds
        return [turn for some in turns for turn in some]

    async def _chunk(self, positions: range, step: int, clock: _Clock) -> list[Turn]:
        rows = [self._prompts.at(position) for position in positions]
        prompts = [
            SamplePrompt(row.token_ids, seed_of(self._plan.seed, position, 0))
            for row, position in zip(rows, positions, strict=True)
        ]
        answers = await self._sampler.sample(prompts, self._options)
        sampled = clock.sampled()
        asked = zip(positions, rows, answers, strict=True)
        turns = await all_of(self._turn(position, row, some, step) for position, row, some in asked)
        clock.judged(sampled)
        return turns

    async def _turn(self, position: int, row: PromptRow, samples: tuple[Sample, ...], step: int) -> Turn:
        texts = tuple(self._decode(sample.token_ids) for sample in samples)
        if min(sample.version for sample in samples) < self._plan.required(step):
            return Turn(position, row, samples, texts, None, (), (), STALE)
        answers = [Answer(text, one.token_ids, one.finished) for text, one in zip(texts, samples, strict=True)]
        chosen = await self._source.choose(row, answers, f"{self._plan.seed} {position}")
        places = tuple((choice.chosen, choice.rejected) for choice in chosen.choices)
        pairs = tuple(pair_row(position, row, samples, choice) for choice in chosen.choices)
        return Turn(position, row, samples, texts, chosen.verdict, places, pairs, chosen.dropped)


class _Clock:
    """The longest way to an answer, and the longest from there to a verdict, of chunks that were asked together."""

    def __init__(self) -> None:
        self._started = monotonic()
        self.sample_seconds = self.judge_seconds = 0.0

    def sampled(self) -> float:
        now = monotonic()
        self.sample_seconds = max(self.sample_seconds, now - self._started)
        return now

    def judged(self, sampled: float) -> None:
        self.judge_seconds = max(self.judge_seconds, monotonic() - sampled)


def _told(error: Exception) -> TrainingError:
    """An error nobody foresaw, as one that says where it came from."""
    told = TrainingError(f"making pairs failed: {type(error).__name__}: {error}")
    told.__cause__ = error
    return told
