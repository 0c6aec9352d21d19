"""Online runs without Ray: a curator in this process, and a sampler of transformers whose answers all end."""

from __future__ import annotations

import dataclasses
import random

from dpo_service.online.assemble import build_curator, build_feed
from dpo_service.online.fake_sampler import FakeSampler
from dpo_service.online.inprocess import InProcessCurator
from dpo_service.online.port import Sample
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.judge import SelfRewardingJudgeSpec
from dpo_service.train.loop import train
from dpo_service.train.ranks import Ranks

PATTERNS = ["[a-f]", "[g-p]", "[A-Z]", "[0-9]", "e"]
RULES = {
    "kind": "rules",
    "rules": [{"rule": "pattern", "pattern": one, "weight": 2.0**at} for at, one in enumerate(PATTERNS)],
}
"""A judge that finds random answers of different worth."""


class Finishing(FakeSampler):
    """Random answers seldom end, and some sources let only finished ones win: these are said to."""

    def _answer(self, ids, seed, options):
        return dataclasses.replace(super()._answer(ids, seed, options), finished=True)


class Judging(Finishing):
    """Asked as a judge, it gives a score."""

    def __init__(self, run, model_dir):
        super().__init__(run.online.samplers, model_dir, 0)
        judge = run.online.judge
        self._asked = judge.max_tokens if isinstance(judge, SelfRewardingJudgeSpec) else None
        self._tokenizer = Tokenizer.load(model_dir)

    def _answer(self, ids, seed, options):
        if options.max_tokens != self._asked:
            return super()._answer(ids, seed, options)
        said = self._tokenizer.encode(f"Score: {random.Random(seed).randint(0, 5)}", add_special_tokens=False)
        return Sample(tuple(said), (0.0,) * len(said), True, self._version)


def train_online(run, dataset, model_dir, *, store, base_digest, reports):
    """`train.loop.train` of a run that samples its pairs."""
    sampler = Judging(run, model_dir)
    with InProcessCurator(lambda: build_curator(run, dataset, store, model_dir, sampler)) as client:
        feed = build_feed(run, dataset, store, client, Ranks())
        return train(run, dataset, model_dir, store=store, base_digest=base_digest, reports=reports, feed=feed)
