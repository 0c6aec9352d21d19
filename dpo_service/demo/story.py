"""The main job, told from its beginning: every step through the public REST API.

own files given?   no: make model and corpus ─> supervised job ─┐
                  yes: divide the file ─────────────────────────┴─> DPO job ─> deploy both ─> ask both ─> table
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_service.cli.client import Json, Service
from dpo_service.cli.cmd_jobs import create_job
from dpo_service.cli.cmd_models import wait_running
from dpo_service.cli.exits import CliError, ExitCode
from dpo_service.cli.jobfile import Document, load
from dpo_service.cli.output import print_json
from dpo_service.cli.watch import follow, require_success
from dpo_service.demo import asking, report
from dpo_service.demo.console import Narrator
from dpo_service.demo.corpus import Corpus, Task, generate, preference_rows, supervised_rows, write_jsonl
from dpo_service.demo.own import OwnData, context_of, divide
from dpo_service.demo.service import ensure

BASE = "demo-base"
N_SUPERVISED, N_PAIRS, N_HELD_OUT = 20_000, 4_096, 300
N_JUDGED = 80
MAX_TOKENS, OWN_MAX_TOKENS = 40, 96
CONFIGS = Path(__file__).resolve().parents[2] / "configs"

Message = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """A DPO job that succeeded, with what its evaluations said."""

    base: str
    tuned: str
    before: dict[str, float]
    after: dict[str, float]


def run(*, data_dir: Path, port: int | None, model: str | None, data: Path | None, as_json: bool) -> int:
    """The demo; returns the exit code.

    Raises:
        CliError: a step failed; the message says which and why.
    """
    if (model is None) != (data is None):
        raise CliError("give both a model and a preference file (MODEL=... DATA=...), or neither", ExitCode.USAGE)
    if model is not None and data is not None:
        outcome, service = _own_story(data_dir, port, model, data)
    else:
        outcome, service = _generated_story(data_dir, port)
    if as_json:
        print_json(outcome.as_json())
        return int(ExitCode.OK)
    report.show(outcome)
    report.show_next_steps(outcome, service.url, str(data_dir))
    return int(ExitCode.OK)


def _generated_story(data_dir: Path, port: int | None) -> tuple[report.Outcome, Service]:
    say = Narrator(6)
    say.say("From nothing to a served, preference-tuned model. Everything goes through the REST API of the service.")
    corpus, service = _make_inputs(say, data_dir), start(say, data_dir, port, None)
    files = data_dir / "demo"
    with say.stage("supervised", f"Train {BASE} on {N_SUPERVISED:,} answers, half of them bad on purpose"):
        job = train(service, job_of("demo-supervised", model=BASE, training_file=files / "supervised.jsonl"))
        say.say(f"The base model of what follows is {job['fine_tuned_model']}.")
    trained = _dpo(
        say,
        service,
        job_of(
            "demo-dpo",
            model=str(job["fine_tuned_model"]),
            training_file=files / "pairs.jsonl",
            validation_file=files / "held-out.jsonl",
        ),
        f"DPO on {N_PAIRS:,} preference pairs, evaluated on {N_HELD_OUT} pairs that are held out",
    )
    _deploy(say, service, (trained.base, trained.tuned))
    return _judge(say, service, trained, corpus.held_out), service


def _make_inputs(say: Narrator, data_dir: Path) -> Corpus:
    """The model directory under <data-dir>/models, the files under <data-dir>/demo."""
    with say.stage("inputs", "Make a base model and a corpus"):
        corpus, files = generate(N_SUPERVISED, N_PAIRS, N_HELD_OUT), data_dir / "demo"
        write_jsonl(files / "supervised.jsonl", supervised_rows(corpus))
        write_jsonl(files / "pairs.jsonl", preference_rows(corpus.pairs))
        write_jsonl(files / "held-out.jsonl", preference_rows(corpus.held_out))
        say.say(
            f"{N_SUPERVISED:,} answers, {N_PAIRS:,} pairs and {N_HELD_OUT} held-out pairs, no prompt twice: {files}/"
        )
        make_base(say, data_dir, corpus)
    return corpus


def make_base(say: Narrator, data_dir: Path, corpus: Corpus) -> None:
    """The demo's model with random weights, unless an earlier run has made it."""
    directory = data_dir / "models" / BASE
    if (directory / "config.json").exists():
        return
    from dpo_service.demo.model import make_base_model

    size = make_base_model(directory, (f"{prompt}\n{answer}" for prompt, answer in corpus.supervised))
    say.say(f"A Llama of {size / 1e6:.1f} million random parameters with its own tokenizer: {directory}/")


def start(say: Narrator, data_dir: Path, port: int | None, model_root: Path | None) -> Service:
    """The service on `data_dir`, running. `model_root` as in `service.ensure`."""
    with say.stage("service", f"Start the service on {data_dir} (SQLite, Ray on this machine)"):
        service, new = ensure(data_dir, port, model_root)
        say.say(f"{'Started' if new else 'It was running already'}: {service.url}")
    return service


def job_of(config: str, **values: str | Path) -> Document:
    """The job of configs/{config}.yaml with these fields filled in. Raises CliError where there is no such file."""
    path = CONFIGS / f"{config}.yaml"
    if not path.is_file():
        raise CliError(f"{path} is missing; run the demo from a checkout of the project (make demo)", ExitCode.USAGE)
    return load(path) | {name: str(value) for name, value in values.items()}


def train(service: Service, document: Document) -> Json:
    """Submit a job and watch it to its end; returns it. See `follow` for what is shown."""
    job, _ = follow(service, str(create_job(service, document)["id"]))
    require_success(job)
    return job


def _dpo(say: Narrator, service: Service, document: Document, title: str) -> Trained:
    with say.stage("dpo", title):
        created = create_job(service, document)
        job, progress = follow(service, str(created["id"]))
        require_success(job)
        if not progress.evals:
            raise CliError(f"job {job['id']} reported no evaluation on the held-out pairs")
        first, last = min(progress.evals), max(progress.evals)
        say.say(f"Published as {job['fine_tuned_model']}.")
    return Trained(str(document["model"]), str(job["fine_tuned_model"]), progress.evals[first], progress.evals[last])


def _deploy(say: Narrator, service: Service, models: Iterable[str]) -> None:
    with say.stage("deploy", "Serve both models with vLLM on Ray Serve"):
        deployments = [service.post("/v1/deployments", {"model": model}) for model in models]
        for deployment in deployments:
            wait_running(service, str(deployment["id"]))
            say.say(f"{deployment['model']} answers under {service.url}/v1/chat/completions")


def _judge(say: Narrator, service: Service, trained: Trained, held_out: tuple[Task, ...]) -> report.Outcome:
    tasks = held_out[:N_JUDGED]
    questions: list[list[Message]] = [[{"role": "user", "content": task.prompt}] for task in tasks]
    with say.stage("ask", f"Ask both models {N_JUDGED} held-out questions"):
        base, tuned = (
            asking.ask(service, model, questions, max_tokens=MAX_TOKENS) for model in (trained.base, trained.tuned)
        )
    samples = _one_a_family(tasks, base, tuned)
    good = (asking.good_share(tasks, base), asking.good_share(tasks, tuned))
    return _outcome(say, trained, N_HELD_OUT, samples, len(tasks), good)


def _one_a_family(tasks: tuple[Task, ...], base: list[str], tuned: list[str]) -> tuple[report.Sample, ...]:
    """The first question of each family: what they show is not chosen by the answers."""
    first: dict[str, report.Sample] = {}
    for task, before, after in zip(tasks, base, tuned, strict=True):
        first.setdefault(task.family, report.Sample(task.prompt, before, after))
    return tuple(first.values())[: report.SIDE_BY_SIDE]


def _outcome(
    say: Narrator,
    trained: Trained,
    pairs: int,
    samples: tuple[report.Sample, ...],
    judged: int = 0,
    good: tuple[float, float] | None = None,
) -> report.Outcome:
    return report.Outcome(
        base_model=trained.base,
        tuned_model=trained.tuned,
        held_out_pairs=pairs,
        accuracy_before=trained.before["rewards/accuracies"],
        accuracy_after=trained.after["rewards/accuracies"],
        margin_before=trained.before["rewards/margins"],
        margin_after=trained.after["rewards/margins"],
        judged=judged,
        good_before=good[0] if good else None,
        good_after=good[1] if good else None,
        samples=samples,
        seconds=round(say.total, 1),
    )


def _own_story(data_dir: Path, port: int | None, model: str, data: Path) -> tuple[report.Outcome, Service]:
    say = Narrator(5)
    local = Path(model).resolve() if Path(model).is_dir() else None
    with say.stage("inputs", f"Divide {data} into rows to train on and rows held out"):
        own = divide(data, data_dir / "demo")
        say.say(f"{own.rows:,} rows to train on, {own.held_out_rows} held out")
    service = start(say, data_dir, port, local)
    name = str(local) if local else model
    document = job_of("demo-own", model=name, training_file=own.training, validation_file=own.held_out)
    document["max_length"] = min(document["max_length"], context_of(local))
    trained = _dpo(say, service, document, f"DPO of {model}: at most {document['max_steps']} steps")
    _deploy(say, service, (trained.base, trained.tuned))
    return _ask_own(say, service, trained, own), service


def _ask_own(say: Narrator, service: Service, trained: Trained, own: OwnData) -> report.Outcome:
    with say.stage("ask", f"Ask both models {len(own.questions)} held-out questions"):
        base, tuned = (
            asking.ask(service, model, own.questions, max_tokens=OWN_MAX_TOKENS, lenient=True)
            for model in (trained.base, trained.tuned)
        )
    prompts = [str(question[-1]["content"]) for question in own.questions]
    samples = tuple(report.Sample(*row) for row in zip(prompts, base, tuned, strict=True))
    return _outcome(say, trained, own.held_out_rows, samples)
