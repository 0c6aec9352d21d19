"""The demo of online training: a model learns from what it says itself. Every step through the public REST API.

model, prompts ─> supervised job, or that of an earlier run ─> online job: sample, judge, pair, train, sync, anew
                                                                  └─ held-out score ─> table, PNG; samples of both ends
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table

from dpo_service.cli.client import Service, job_path
from dpo_service.cli.cmd_jobs import create_job
from dpo_service.cli.cmd_samples import show as show_sample
from dpo_service.cli.exits import CliError, ExitCode
from dpo_service.cli.jobfile import Document
from dpo_service.cli.output import duration, out, print_json, table
from dpo_service.cli.watch import Progress, follow, require_success
from dpo_service.demo import corpus, lists
from dpo_service.demo.console import Narrator
from dpo_service.demo.corpus import write_jsonl
from dpo_service.demo.plot import Labels, Line, Point, draw
from dpo_service.demo.story import BASE, N_HELD_OUT, N_PAIRS, N_SUPERVISED, job_of, make_base, start, train
from dpo_service.specs.eval import REWARD

N_ANSWERS, N_PROMPTS, N_ASKED = 8_000, 4_096, 200
"""Supervised answers; prompts to train on; prompts that are held out."""
SUPERVISED, ONLINE = "demo-online-supervised", "demo-online"
SAMPLED_REWARD = "online/reward"
SHOWN = 2
"""Prompts whose answers are shown, of the first step and of the last."""
BAR = 30


@dataclass(frozen=True)
class Outcome:
    """What the demo measured, on prompts that nothing was trained on."""

    job: str
    base_model: str
    tuned_model: str
    scores: dict[int, float]
    """The judge's mean score of the policy's answers to held-out prompts, 0 to 1, by training step."""
    sampled: tuple[Point, ...]
    """The same of the answers that were trained on: (step, score)."""
    plot: str
    seconds: float

    @property
    def before(self) -> float:
        return self.scores[min(self.scores)]

    @property
    def after(self) -> float:
        return self.scores[max(self.scores)]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"before": self.before, "after": self.after}


def run(*, data_dir: Path, port: int | None, as_json: bool) -> int:
    """The demo; returns the exit code.

    Raises:
        CliError: a step failed; the message says which and why.
    """
    say = Narrator(4)
    say.say("A model learns from its own answers, which rules judge. Everything goes through the service's REST API.")
    _make_inputs(say, data_dir)
    service = start(say, data_dir, port, None)
    outcome = _train_online(say, service, data_dir, _supervised(say, service, data_dir))
    picture(outcome)
    if as_json:
        print_json(outcome.as_json())
        return int(ExitCode.OK)
    show(outcome)
    show_samples(service, outcome)
    show_next_steps(outcome, str(data_dir))
    return int(ExitCode.OK)


def _make_inputs(say: Narrator, data_dir: Path) -> None:
    with say.stage("inputs", f"Make a base model, and prompts that ask for {lists.WANTED} things"):
        made, files = lists.generate(N_ANSWERS, N_PROMPTS, N_ASKED), data_dir / "demo"
        write_jsonl(files / "lists-supervised.jsonl", lists.supervised_rows(made))
        write_jsonl(files / "lists-prompts.jsonl", lists.prompt_rows(made.prompts))
        write_jsonl(files / "lists-held-out.jsonl", lists.prompt_rows(made.held_out))
        say.say(
            f"{N_ANSWERS:,} answers of {lists.LONGEST} words at most, {N_PROMPTS:,} prompts without answers, and "
            f"{N_ASKED} that are held out: {files}/"
        )
        make_base(say, data_dir, corpus.generate(N_SUPERVISED, N_PAIRS, N_HELD_OUT))


def _supervised(say: Narrator, service: Service, data_dir: Path) -> str:
    """The supervised model: of an earlier run, or trained now."""
    with say.stage("supervised", f"Teach {BASE} to say lists that are too short, half of them in a wrong form"):
        job = job_of(SUPERVISED, model=BASE, training_file=data_dir / "demo" / "lists-supervised.jsonl")
        earlier = trained_before(service, job)
        model = earlier or str(train(service, job)["fine_tuned_model"])
        say.say(f"The policy begins as {model}{', which an earlier run has trained' if earlier else ''}.")
        return model


def trained_before(service: Service, job: Document) -> str | None:
    """What an earlier job of this model and suffix, and with this seed, has published and nobody has removed."""
    published = {str(model["id"]) for model in service.get("/v1/models")["data"]}
    for done in service.pages("/v1/fine_tuning/jobs"):
        same = all(done.get(field) == job[field] for field in ("model", "suffix", "seed"))
        if same and done["status"] == "succeeded" and done.get("fine_tuned_model") in published:
            return str(done["fine_tuned_model"])
    return None


def _train_online(say: Narrator, service: Service, data_dir: Path, base: str) -> Outcome:
    files = data_dir / "demo"
    job = job_of(
        ONLINE,
        model=base,
        training_file=files / "lists-prompts.jsonl",
        validation_file=files / "lists-held-out.jsonl",
    )
    title = f"Online DPO: {job['max_steps']} steps of sample, judge, pair, train, sync"
    with say.stage("online", title):
        created = create_job(service, job)
        ended, progress = follow(service, str(created["id"]))
        require_success(ended)
        scores, sampled = held_out_scores(progress), sampled_scores(progress)
        say.say(f"Published as {ended['fine_tuned_model']}.")
    plot = str(files / "online.png")
    return Outcome(str(ended["id"]), base, str(ended["fine_tuned_model"]), scores, sampled, plot, round(say.total, 1))


def held_out_scores(progress: Progress) -> dict[int, float]:
    """Raises CliError where the job evaluated nothing."""
    scores = {step: values[REWARD] for step, values in sorted(progress.evals.items()) if REWARD in values}
    if not scores:
        raise CliError(f"job {progress.job_id} reported no evaluation on the held-out prompts")
    return scores


def sampled_scores(progress: Progress) -> tuple[Point, ...]:
    steps, rewards = progress.history.get("step", []), progress.history.get(SAMPLED_REWARD, [])
    return tuple(zip(steps, rewards, strict=True))


def picture(outcome: Outcome) -> None:
    """Both scores by step, as a PNG."""
    lines = [Line("held-out prompts", tuple(outcome.scores.items()))]
    if outcome.sampled:
        lines.append(Line("answers that were trained on", outcome.sampled))
    draw(Path(outcome.plot), lines, Labels("What rules say of the policy's answers", "steps of 32 pairs", "score"))


def show(outcome: Outcome) -> None:
    """The scores, by step."""
    out.print()
    out.print(_curve(outcome.scores))
    out.print(f"[dim]What the rules say of the policy's answers to {N_ASKED} prompts that were not trained on.[/dim]")
    out.print(f"The same, and the score of what was trained on, as a picture: {outcome.plot}", soft_wrap=True)


def _curve(scores: dict[int, float]) -> Table:
    rows = [(str(step), f"{score:.2f}", "█" * round(score * BAR)) for step, score in scores.items()]
    return table(("step", "score", ""), rows, title="Held-out score, 0 to 1")


def show_samples(service: Service, outcome: Outcome) -> None:
    """As `dpo samples` does, of both ends of the run."""
    for title, step in (("the first step", 1), ("the last", max(outcome.scores))):
        out.print(f"\n[bold]Sampled for {title}:[/bold]")
        path = f"{job_path(outcome.job)}/samples"
        for sample in islice(service.pages(path, step=step, limit=SHOWN), SHOWN):
            show_sample(sample, full=False)


def show_next_steps(outcome: Outcome, data_dir: str) -> None:
    where = f"--data-dir {data_dir}"
    rows = [
        (
            "see what it sampled",
            f".venv/bin/dpo samples {outcome.job} --step {sorted(outcome.scores)[len(outcome.scores) // 2]} {where}",
        ),
        ("see every metric", f".venv/bin/dpo metrics {outcome.job} {where}"),
        ("serve it and ask it", f".venv/bin/dpo deploy {outcome.tuned_model} --wait {where}"),
        ("", f".venv/bin/dpo chat {outcome.tuned_model} {where}"),
        ("a job of your own", "configs/online-verifier.yaml (rules), configs/online-judge.yaml (a language model)"),
        ("stop everything", f".venv/bin/dpo down {where}"),
    ]
    out.print(
        f"Done in {duration(outcome.seconds)}: the held-out score went from {outcome.before:.2f} to "
        f"{outcome.after:.2f}. How to go on:"
    )
    for what, command in rows:
        out.print(f"  {what:<24} {command}", soft_wrap=True, markup=False)
