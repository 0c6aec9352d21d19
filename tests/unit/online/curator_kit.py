"""A scripted sampler and a scripted judge: tests say when an answer comes, and which one is good."""

from __future__ import annotations

import asyncio

from dpo_service.online.curator import Curator, CuratorPlan
from dpo_service.online.evaluation import HeldOut, Question
from dpo_service.online.judges.metrics import Counted
from dpo_service.online.judges.port import Verdict
from dpo_service.online.port import Sample, Synced, Weights
from dpo_service.online.prompts import PromptRow
from dpo_service.online.sources import Judged
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.sampling import SamplingSpec

PROMPTS = 10


class SomePrompts:
    """Prompt i is the tokens [i, i]; after ten the next epoch begins."""

    def at(self, position):
        index = position % PROMPTS
        return PromptRow(index, (index, index), f"prompt {index}", None, {})


class ScriptedSampler:
    """Answers (version, place, seed). While `held` is cleared, no answer comes."""

    def __init__(self):
        self.held = asyncio.Event()
        self.held.set()
        self.asked = asyncio.Event()
        self.prompts, self.versions, self.current = [], [], 0
        self.fails = self.refuses = None
        self.closed = self.asleep = False

    async def sleep(self):
        self.asleep = True

    async def wake(self):
        self.asleep = False

    async def sample(self, prompts, options):
        assert not self.asleep
        self.prompts += prompts
        self.versions += [self.current] * len(prompts)
        self.asked.set()
        await self.held.wait()
        if self.fails:
            raise self.fails
        return [tuple(self._answer(prompt, place) for place in range(options.n)) for prompt in prompts]

    def _answer(self, prompt, place):
        return Sample((self.current, place, prompt.token_ids[0]), (-0.5, -0.25, -0.25), True, self.current)

    async def sync(self, weights):
        assert not self.asleep
        if self.refuses:
            raise self.refuses
        self.current = weights.version
        return Synced(weights.version, 0.1, 0.0)

    async def close(self):
        self.closed = True


class ScriptedJudge:
    """The score of an answer is its place, but for prompts in `ties`, and those that `fails` says."""

    name, digest = "scripted", "d"

    def __init__(self, ties=(), fails=None):
        self.ties, self.fails, self.closed = set(ties), fails, False

    async def judge(self, request):
        if self.fails:
            raise self.fails
        index = int(request.prompt.split()[1])
        scores = tuple(0.0 if index in self.ties else float(place) for place in range(len(request.answers)))
        return Verdict("scripted", scores)

    async def close(self):
        self.closed = True


class KeptSamples:
    def __init__(self):
        self.steps = {}

    async def write(self, step, turns):
        self.steps[step] = turns


class Loop:
    """A curator and what it was given. Held-out prompts, if asked for, are the tokens [index] from 100 on."""

    def __init__(self, *, held_out=0, judge=None, choose="best_worst", n=3, total_steps=100, size=4, **plan):
        self.sampler, self.judge, self.kept = ScriptedSampler(), judge or ScriptedJudge(), KeptSamples()
        self.valid_judge, options = ScriptedJudge(), SamplingSpec(n=1, max_tokens=8)
        question = Question(options, 7, lambda ids: " ".join(map(str, ids)), chunk=2)
        rows = [PromptRow(100 + row, (100 + row,), f"prompt {row}", None, {}) for row in range(held_out)]
        self.curator = Curator(
            CuratorPlan(total_steps=total_steps, pairs_per_step=size, seed=7, **plan),
            SomePrompts(),
            self.sampler,
            Judged(Counted(self.judge), PairingSpec(choose=choose)),
            SamplingSpec(n=n, max_tokens=8),
            lambda ids: " ".join(map(str, ids)),
            self.kept,
            HeldOut(rows, self.valid_judge, question) if held_out else None,
        )

    async def evaluation(self, step):
        """Fails, where it would wait for ever."""
        return await asyncio.wait_for(self.curator.evaluate(step), 20)

    def asked(self, *, held_out):
        """The prompts that the sampler was asked, with the versions that answered them."""
        told = zip(self.sampler.prompts, self.sampler.versions, strict=True)
        return [(prompt, version) for prompt, version in told if (prompt.token_ids[0] >= 100) == held_out]

    async def start(self, step=0, counters=None):
        await self.curator.start(step, version(step), counters or {})

    async def pairs(self, step):
        """Fails, where it would wait for ever."""
        return await asyncio.wait_for(self.curator.pairs(step), 20)

    async def trained(self, step):
        """Step number `step` was computed."""
        await self.curator.published(version(step + 1))


def version(number):
    return Weights(number, "full", f"v{number}", "digest")


async def settle(turns=200):
    """Let everything run that can."""
    for _ in range(turns):
        await asyncio.sleep(0)
