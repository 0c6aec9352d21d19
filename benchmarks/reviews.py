"""The task of `benchmarks.frontier`: reviews of things, eight words each, from damning to raving.

    "Clara the baker on the kettle:"  ──>  "solid, dull, superb, usable, weak, handy, vile, neat"

Each place's word is drawn evenly from five grades of three words. The reward is the mean grade of the eight places, 0
to 1, as the job's own rules see it: graded finely enough that two answers seldom tie. As words are independent and
even, the best that any policy can do at a distance from such a base is known exactly.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_service.demo.words import JOBS, NAMES, NOUNS
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.judge import RulesJudgeSpec

GRADES = (
    ("vile", "awful", "broken"),
    ("dull", "weak", "clumsy"),
    ("plain", "usable", "common"),
    ("solid", "neat", "handy"),
    ("superb", "lovely", "brilliant"),
)
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
    words = [word for grade in GRADES for word in grade]
    return [(prompt, ", ".join(rng.choices(words, k=WORDS))) for prompt in rng.sample(asked, count)]


def encode(model_dir: Path, rows: list[tuple[str, str]]) -> list[Encoded]:
    tokenizer = Tokenizer.load(model_dir)
    assert tokenizer.eos_token_id is not None
    encoded = []
    for prompt, review in rows:
        asked = tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        prompt_ids, answer_ids = (tokenizer.encode(text, add_special_tokens=False) for text in (asked, review))
        encoded.append(Encoded(prompt, prompt_ids, [*answer_ids, tokenizer.eos_token_id]))
    return encoded


def judge() -> RulesJudgeSpec:
    """A rule for each place and each grade but the lowest: the word there is of this grade or above."""
    rules: list[dict[str, Any]] = []
    for place in range(WORDS):
        for lowest in range(1, len(GRADES)):
            words = "|".join(word for grade in GRADES[lowest:] for word in grade)
            rules.append({"rule": "pattern", "pattern": rf"^\s*(?:\w+, ){{{place}}}(?:{words})\b"})
    return RulesJudgeSpec.model_validate({"rules": rules})


def best(tilt: float) -> tuple[float, float]:
    """(KL, reward) of a best policy, where the base is as the reviews are: no policy has a higher reward at this KL.

    It is the base weighed by exp(tilt * WORDS * reward) (arXiv:2305.18290, eq. 4): at each place exp(tilt * grade).
    """
    values = [grade / (len(GRADES) - 1) for grade in range(len(GRADES))]
    total = sum(math.exp(tilt * value) for value in values) / len(values)
    mean = sum(value * math.exp(tilt * value) for value in values) / len(values) / total
    return WORDS * (tilt * mean - math.log(total)), mean
