"""The demo's results: the before/after table, answers side by side, and how to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from dpo_service.cli.output import duration, out, table

SIDE_BY_SIDE = 8
ANSWER_CHARACTERS = 300


@dataclass(frozen=True)
class Sample:
    prompt: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Outcome:
    """What the demo measured. All of it on prompts that nothing was trained on."""

    base_model: str
    tuned_model: str
    held_out_pairs: int
    accuracy_before: float
    accuracy_after: float
    margin_before: float
    margin_after: float
    judged: int
    """Prompts whose answers the rule judge looked at; 0 = no judge."""
    good_before: float | None
    good_after: float | None
    samples: tuple[Sample, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def show(outcome: Outcome) -> None:
    out.print()
    out.print(_numbers(outcome))
    out.print(
        "[dim]Reward: beta x how much likelier (in nats) an answer is than under the model before DPO. Before DPO the "
        "two are the same, so no answer is preferred: accuracy one half, margin 0.[/dim]"
    )
    out.print()
    out.print(_answers(outcome.samples))


def _numbers(outcome: Outcome) -> Table:
    rows = [
        ("reward accuracy", f"{outcome.accuracy_before:.2f}", f"{outcome.accuracy_after:.2f}"),
        ("reward margin", f"{round(outcome.margin_before, 2) + 0.0:.2f}", f"{outcome.margin_after:.2f}"),
    ]
    if outcome.good_before is not None and outcome.good_after is not None:
        name = f"good answers, by the rule judge ({outcome.judged} prompts)"
        rows.append((name, f"{outcome.good_before:.0%}", f"{outcome.good_after:.0%}"))
    title = f"Held out: {outcome.held_out_pairs} pairs that were not trained on"
    return table(("", "before DPO", "after DPO"), rows, title=title)


def _answers(samples: Sequence[Sample]) -> Table:
    result = Table("prompt", "before DPO", "after DPO", title="Sampled answers", title_justify="left", show_lines=True)
    for sample in samples:
        result.add_row(*(escape(_short(text)) for text in (sample.prompt, sample.base, sample.tuned)))
    return result


def _short(text: str) -> str:
    return text if len(text) <= ANSWER_CHARACTERS else text[:ANSWER_CHARACTERS].rstrip() + " ..."


def show_next_steps(outcome: Outcome, url: str, data_dir: str) -> None:
    where = f"--data-dir {data_dir}"
    rows = [
        ("talk to the tuned model", f".venv/bin/dpo chat {outcome.tuned_model} {where}"),
        ("see models and jobs", f".venv/bin/dpo models {where}; .venv/bin/dpo jobs {where}"),
        ("train on your own file", f".venv/bin/dpo submit FILE --model MODEL --watch {where}"),
        ("check it first", ".venv/bin/dpo data check FILE --model MODEL-DIRECTORY"),
        ("from Python", f'openai.OpenAI(base_url="{url}/v1", api_key="none")'),
        ("read the REST API", f"{url}/docs"),
        ("stop everything", f".venv/bin/dpo down {where}"),
    ]
    out.print()
    out.print(f"Done in {duration(outcome.seconds)}. The service is still running at {url}. How to go on:")
    for what, command in rows:
        out.print(f"  {what:<24} {command}", soft_wrap=True, markup=False)
