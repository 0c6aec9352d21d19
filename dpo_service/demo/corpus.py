"""The demo's corpus: generated tasks whose answers a rule can check.

    families ── generate ──> tasks, each with a prompt nobody else has, a good answer and a bad one
                                ├── supervised rows   prompt -> good or bad, half and half: a mediocre base model
                                ├── preference pairs  prompt -> good > bad
                                └── held-out pairs    the same on prompts seen in neither

The bad answers are systematic (the wrong end of a list, the right words in the wrong form, a refusal), so that the base
model learns both kinds of answer about equally well and has no preference of its own. In some families the good answer
is the longer one and in others the bad one, so that length alone decides nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_service.demo.words import CAPITALS, COLOURS, JOBS, NAMES, NOUNS, NUMBERS, OPPOSITES

GOOD_SHARE = 0.5
"""Share of supervised rows with a good answer."""


@dataclass(frozen=True)
class Task:
    """One prompt with the answer it asks for and one that misses it."""

    family: str
    prompt: str
    good: str
    bad: str


@dataclass(frozen=True)
class Corpus:
    supervised: tuple[tuple[str, str], ...]
    """(prompt, answer)"""
    pairs: tuple[Task, ...]
    held_out: tuple[Task, ...]


def _pick(rng: random.Random) -> Task:
    words = rng.sample(NOUNS, rng.randint(3, 4))
    end, good, bad = rng.choice([("first", words[0], words[-1]), ("last", words[-1], words[0])])
    return Task(
        "pick",
        f"Which word comes {end}: {', '.join(words)}?",
        f"The {end} word is {good}.",
        f"The {end} word is {bad}.",
    )


def _repeat(rng: random.Random) -> Task:
    word, times = rng.choice(NOUNS), rng.randint(2, 4)
    wrong = times + rng.choice([-1, 1])
    joined = [" ".join([word] * n) for n in (times, wrong)]
    return Task("repeat", f"{rng.choice(NAMES)} asks: say {word} {NUMBERS[times]} times.", joined[0], joined[1])


def _colour(rng: random.Random) -> Task:
    (one, two), (red, blue) = rng.sample(NOUNS, 2), rng.sample(COLOURS, 2)
    prompt = f"The {one} is {red} and the {two} is {blue}. What colour is the {one}?"
    return Task("colour", prompt, f"The {one} is {red}.", f"The {one} is {blue}.")


def _brackets(rng: random.Random) -> Task:
    words = rng.sample(NOUNS, rng.randint(2, 3))
    joined = " ".join(words)
    return Task("brackets", f"Put brackets around: {joined}", f"[ {joined} ]", f"Here it is: {joined}")


def _form(rng: random.Random) -> Task:
    name, job, age = rng.choice(NAMES), rng.choice(JOBS), rng.randint(20, 79)
    prompt = f"Fill in the form: {name} is a {job} and {age} years old."
    return Task("form", prompt, f"name: {name}\njob: {job}\nage: {age}", f"{name} is a {job} and {age}.")


def _city(rng: random.Random) -> Task:
    land, name, job = rng.choice(list(CAPITALS)), rng.choice(NAMES), rng.choice(JOBS)
    prompt = f"{name}, the {job}, would like to know the capital of {land}."
    return Task("city", prompt, f"The capital of {land} is {CAPITALS[land]}.", f"Sorry, {name}, I do not know that.")


def _opposite(rng: random.Random) -> Task:
    word, noun, name = rng.choice(list(OPPOSITES)), rng.choice(NOUNS), rng.choice(NAMES)
    prompt = f"The {noun} that {name} has is not {word}. What is it then?"
    return Task("opposite", prompt, f"It is {OPPOSITES[word]}.", f"It is a {word} {noun}.")


def _greet(rng: random.Random) -> Task:
    name, job, noun = rng.choice(NAMES), rng.choice(JOBS), rng.choice(NOUNS)
    prompt = f"Greet {name}, the {job} with the {noun}, politely."
    return Task("greet", prompt, f"Good morning, {name}. How may I help you?", f"What do you want, {job}?")


def _brief(rng: random.Random) -> Task:
    name, noun, colour = rng.choice(NAMES), rng.choice(NOUNS), rng.choice(COLOURS)
    prompt = f"In one word: {name} has a {colour} {noun}. What does {name} have?"
    return Task("brief", prompt, noun, f"{name} has a {colour} {noun}, I would say.")


def _list(rng: random.Random) -> Task:
    words = rng.sample(NOUNS, 3)
    prompt = f"Make a numbered list: {', '.join(words)}"
    good = "\n".join(f"{place}. {word}" for place, word in enumerate(words, 1))
    return Task("list", prompt, good, ", ".join(words))


FAMILIES: dict[str, Callable[[random.Random], Task]] = {
    "pick": _pick,
    "repeat": _repeat,
    "colour": _colour,
    "brackets": _brackets,
    "form": _form,
    "city": _city,
    "opposite": _opposite,
    "greet": _greet,
    "brief": _brief,
    "list": _list,
}


def generate(n_supervised: int, n_pairs: int, n_held_out: int, seed: int = 0) -> Corpus:
    """A corpus whose three parts share no prompt. The same arguments give the same corpus.

    Small families (a few hundred possible prompts) give way to large ones when they run out of new prompts.
    """
    rng = random.Random(seed)
    tasks = _distinct(rng, n_supervised + n_pairs + n_held_out)
    held_out, pairs, rest = tasks[:n_held_out], tasks[n_held_out : n_held_out + n_pairs], tasks[n_held_out + n_pairs :]
    supervised = tuple((task.prompt, task.good if rng.random() < GOOD_SHARE else task.bad) for task in rest)
    return Corpus(supervised, tuple(pairs), tuple(held_out))


def _distinct(rng: random.Random, count: int) -> list[Task]:
    makers, seen, tasks = list(FAMILIES.values()), set[str](), list[Task]()
    while len(tasks) < count:
        task = makers[len(tasks) % len(makers)](rng)
        for _ in range(20):
            if task.prompt not in seen:
                break
            task = rng.choice(makers)(rng)
        else:
            raise ValueError(f"the families have fewer than {count} distinct prompts")
        seen.add(task.prompt)
        tasks.append(task)
    rng.shuffle(tasks)
    return tasks


def supervised_rows(corpus: Corpus) -> Iterator[dict[str, Any]]:
    """Rows of OpenAI's supervised format."""
    for prompt, answer in corpus.supervised:
        yield {"messages": [_message("user", prompt), _message("assistant", answer)]}


def preference_rows(tasks: Iterable[Task]) -> Iterator[dict[str, Any]]:
    """Rows of OpenAI's preference format."""
    for task in tasks:
        yield {
            "input": {"messages": [_message("user", task.prompt)]},
            "preferred_output": [_message("assistant", task.good)],
            "non_preferred_output": [_message("assistant", task.bad)],
        }


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
