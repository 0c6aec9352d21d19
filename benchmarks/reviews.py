"""The task of `benchmarks.frontier`: reviews of things, eight words of praise or blame each.

    "Clara the baker on the kettle:"  ──>  "solid, dull, lovely, bright, weak, handy, cheap, neat"

The reward is the share of the eight places that hold a word of praise, as the job's own rules see it. A review has a
mood, drawn evenly from all of blame to all of praise, and each word follows it; so the model that learned them knows
every reward from 0 to 1 about equally often, whatever it is asked about, and is in a policy's power to prefer the good
moods.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_service.demo.words import JOBS, NAMES, NOUNS
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.judge import RulesJudgeSpec

PRAISE = ("solid", "lovely", "bright", "handy", "neat", "clever", "warm", "great")
BLAME = ("dull", "weak", "cheap", "dirty", "loud", "ugly", "broken", "slow")
WORDS = 8
ANSWER_ROOM = 4 * WORDS
"""Tokens of an answer, at most: a word of the tokenizer's, a comma, and room for what should not be there."""


@dataclass(frozen=True)
class Encoded:
    """A prompt, and a review of it."""

    text: str
    prompt: list[int]
    answer: list[int]


def make(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, review); no prompt twice."""
    rng = random.Random(seed)
    asked = [f"{name} the {job} on the {noun}:" for name in NAMES for job in JOBS for noun in NOUNS]
    return [(prompt, _review(rng)) for prompt in rng.sample(asked, count)]


def _review(rng: random.Random) -> str:
    mood = rng.random()
    return ", ".join(rng.choice(PRAISE if rng.random() < mood else BLAME) for _ in range(WORDS))


def encode(model_dir: Path, rows: list[tuple[str, str]]) -> list[Encoded]:
    tokenizer = Tokenizer.load(model_dir)
    assert tokenizer.eos_token_id is not None
    encoded = []
    for prompt, review in rows:
        asked = tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = (tokenizer.encode(text, add_special_tokens=False) for text in (asked, review))
        prompt_ids, answer_ids = ids
        encoded.append(Encoded(prompt, prompt_ids, [*answer_ids, tokenizer.eos_token_id]))
    return encoded


def judge() -> RulesJudgeSpec:
    """One rule a place, all of the same weight."""
    good = "|".join(PRAISE)
    patterns = [rf"^\s*(?:\w+, ){{{place}}}(?:{good})\b" for place in range(WORDS)]
    rules: list[dict[str, Any]] = [{"rule": "pattern", "pattern": pattern} for pattern in patterns]
    return RulesJudgeSpec.model_validate({"rules": rules})
