"""A task that rules can check and that a model has to grow into: name ten things, as a list, none of them twice.

    supervised rows   prompt -> a list of one to six words, often with a word twice, half of them in another form
    prompts           the same kind of prompt, no answer: what online training samples from
    held-out prompts  prompts of neither

So the supervised model never says ten words, and no choice among its answers is a good one: whoever trains on those
alone learns which way to go and not where to stop. The rules are in configs/demo-online.yaml.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dpo_service.demo.words import COLOURS, NAMES, NOUNS

WANTED = 10
LONGEST = 6
"""Words of a supervised answer, at most."""
AGAIN = 0.3
"""Chance of a supervised answer's next word to be one it already has."""
GOOD_FORM = 0.5
"""Share of supervised answers that are lists at all."""


@dataclass(frozen=True)
class Lists:
    supervised: tuple[tuple[str, str], ...]
    """(prompt, answer)"""
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]


def generate(n_supervised: int, n_prompts: int, n_held_out: int, seed: int = 0) -> Lists:
    """Three parts without a prompt in common. The same arguments give the same lists."""
    rng = random.Random(seed)
    prompts = _distinct(rng, n_supervised + n_prompts + n_held_out)
    held_out, asked = prompts[:n_held_out], prompts[n_held_out : n_held_out + n_prompts]
    supervised = tuple((prompt, _answer(rng)) for prompt in prompts[n_held_out + n_prompts :])
    return Lists(supervised, tuple(asked), tuple(held_out))


def _distinct(rng: random.Random, count: int) -> list[str]:
    everything = [(name, colour, noun) for name in NAMES for colour in COLOURS for noun in NOUNS]
    chosen = rng.sample(everything, count)
    return [f"Name {WANTED} things that {name} has beside the {colour} {noun}." for name, colour, noun in chosen]


def _answer(rng: random.Random) -> str:
    words = [rng.choice(NOUNS)]
    for _ in range(rng.randrange(LONGEST)):
        words.append(rng.choice(words if rng.random() < AGAIN else NOUNS))
    return ", ".join(words) + "." if rng.random() < GOOD_FORM else rng.choice(_OTHER_FORMS)(words)


_OTHER_FORMS: tuple[Callable[[list[str]], str], ...] = (
    lambda words: " ".join(words),
    lambda words: f"There is a {' and a '.join(words)}.",
)


def supervised_rows(lists: Lists) -> Iterator[dict[str, Any]]:
    """Rows of OpenAI's supervised format."""
    for prompt, answer in lists.supervised:
        yield {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def prompt_rows(prompts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rows of a prompt alone."""
    for prompt in prompts:
        yield {"messages": [{"role": "user", "content": prompt}]}
