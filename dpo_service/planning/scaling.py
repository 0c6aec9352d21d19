"""The tables of docs/scaling.md: `python -m dpo_service.planning.scaling docs/scaling.md` writes them anew."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from dpo_service.planning.choose import STRATEGIES, Choice, Question, choose
from dpo_service.planning.gpus import DEVICES, GIB
from dpo_service.planning.memory import PARTS, Recipe
from dpo_service.planning.shape import ModelShape, shape_of
from dpo_service.planning.workload import Lengths

GPU = DEVICES["H100-80"]
WORKERS = (8, 16, 32, 64, 128, 256, 512, 1024)
PAIRS, PROMPT, ANSWER = 1024, 600, 400
"""Of a step; tokens of each pair."""
RANK = 16
MILLION = 1_000_000
LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False}
SIZES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
"""Llama 3.1 (arXiv 2407.21783, table 3)."""
BEGIN, END = "<!-- computed: {} -->", "<!-- end -->"


def shapes() -> dict[str, ModelShape]:
    return {name: shape_of(LLAMA | sizes, name) for name, sizes in SIZES.items()}


def tables() -> dict[str, str]:
    """Markdown by the name of its place in the page."""
    found: dict[tuple[str, int], list[Choice]] = {(name, rank): [] for name in SIZES for rank in (0, RANK)}
    models, lengths = shapes(), Lengths.alike(PAIRS, PROMPT, ANSWER)
    for workers in WORKERS:  # outside, because micro-batches are the same for all models
        for (name, rank), choices in found.items():
            choices.append(choose(_question(models[name], lengths, workers, rank)))
    made = {f"{name}{' LoRA' if rank else ''}": _table(choices) for (name, rank), choices in found.items()}
    return made | {"parts": _parts({name: found[name, 0] for name in SIZES})}


def _question(shape: ModelShape, lengths: Lengths, workers: int, rank: int) -> Question:
    return Question(
        shape=shape,
        recipe=Recipe(precision="bfloat16", lora_rank=rank, workers=workers),
        lengths=lengths,
        batch_size=PAIRS,
        max_length=PROMPT + ANSWER,
        device=GPU,
        rows=PAIRS,
        tokens=None,
        strategies=STRATEGIES,
        checkpointing=(False, True),
    )


def _table(choices: list[Choice]) -> str:
    head = (
        "GPUs", "strategy", "checkpointing", "micro-batch", "GiB a GPU", "fits", "step s", "utilisation", "on the wire",
        "waiting", "bound by", "GPU-hours for 1M pairs",
    )  # fmt: skip
    return _markdown(head, (_row(choice) for choice in choices))


def _row(choice: Choice) -> tuple[str, ...]:
    recipe, speed = choice.recipe, choice.speed
    start = (str(recipe.workers), recipe.strategy, "yes" if recipe.checkpointing else "no")
    memory = (f"{choice.work.largest.tokens:,}", f"{choice.memory.total / GIB:.1f}")
    if not choice.fits(GPU):
        return (*start, *memory, "no", *("" for _ in range(6)))
    return (
        *start,
        *memory,
        "yes",
        f"{speed.step:.2f}",
        f"{speed.useful / speed.step / GPU.bfloat16:.0%}",
        f"{speed.communication / speed.step:.0%}",
        f"{speed.exposed / speed.step:.0%}",
        speed.bound,
        f"{MILLION / PAIRS * speed.step * recipe.workers / 3600:,.0f}",
    )


def _parts(by_model: dict[str, list[Choice]]) -> str:
    """GiB of a GPU by part, on the fewest that the model fits on."""
    first = {name: next(c for c in choices if c.fits(GPU)) for name, choices in by_model.items()}
    head = ("part", *(f"{name} on {choice.recipe.workers}" for name, choice in first.items()))
    sizes = ((part, [choice.memory.parts.get(part, 0) / GIB for choice in first.values()]) for part in PARTS)
    rows = [(part, *(f"{size:.2f}" for size in values)) for part, values in sizes if any(values)]
    total = ("together", *(f"{choice.memory.total / GIB:.2f}" for choice in first.values()))
    return _markdown(head, [*rows, total])


def _markdown(head: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(page: str) -> str:
    """`page` with every computed table as the model has it now."""
    for name, table in tables().items():
        before, begin, rest = page.partition(BEGIN.format(name) + "\n")
        assert begin, f"the page has no place for {name!r}"
        page = before + begin + table + "\n" + rest[rest.index(END) :]
    return page


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(render(path.read_text()))
