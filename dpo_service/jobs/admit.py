"""Decides whether a job can be run, and every number the user left open. A job that is admitted needs no further look:
what would fail an hour later on the cluster is refused here, with the field and the mend.

    JobSpec ── model ── files ── capacity ── rows (tokenizer of the model) ── choices.py ──> RunSpec, DatasetReport

`consider` is all of it that needs no service, for plans (plan.py) as for jobs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np

from dpo_service import ids
from dpo_service.clock import Clock, SystemClock
from dpo_service.cluster.port import Capacity, Cluster
from dpo_service.db.session import Database
from dpo_service.errors import ClusterError, InvalidData, InvalidSpec, ModelRefused, NotFound, Unavailable
from dpo_service.jobs import choices, sampled_checks, sampled_choices
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.manifests.inspection import Inspection, InspectionRequest
from dpo_service.planning.workload import Lengths
from dpo_service.registry import files
from dpo_service.registry.inspection import inspect_model
from dpo_service.registry.models import ModelFacts, keep, resolve, resolve_reward_model
from dpo_service.registry.tables import File
from dpo_service.rows.balance import notes
from dpo_service.rows.check import MIN_ROWS, examine, require_rows
from dpo_service.rows.facts import Facts, decide, report
from dpo_service.rows.formats import Format
from dpo_service.rows.holdout import Mask, hold_out
from dpo_service.rows.kinds import usable
from dpo_service.rows.mismatch import mismatched_rows
from dpo_service.rows.sample import sample_rows
from dpo_service.rows.template import Tokenizer
from dpo_service.settings import Settings
from dpo_service.specs.job import JobSpec
from dpo_service.specs.judge import RewardModelJudgeSpec
from dpo_service.specs.method import RowKind
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.run import ModelSource, RunSpec
from dpo_service.storage.store import Store
from dpo_service.storage.weights import quantised_as

PURPOSE = "fine-tune"
NEEDS = {
    "pairs": "preference pairs",
    "answers": "prompts with one answer each",
    "unpaired": "answers with a label each, or preference pairs",
    "prompts": "prompts",
    "demonstrations": "prompts with a reference answer each",
}
HOLDS = {**NEEDS, "unpaired": "answers with a label each", "prompts": "prompts without answers"}
TAKES = {"pairs": "dpo", "answers": "supervised", "unpaired": "kto", "prompts": "online"}
"""A method for each kind of file."""


Place = Callable[[File], Path]
"""Where a file's content lies."""


@dataclass(frozen=True)
class Files:
    """The files a job names."""

    training: File
    validation: File | None = None
    mix: File | None = None


@dataclass(frozen=True)
class Considered:
    """A job that can run, and what was learned of it on the way."""

    run: RunSpec
    report: DatasetReport
    lengths: Lengths
    """Of the rows to train on."""


@dataclass(frozen=True)
class _Usable:
    report: DatasetReport
    train_rows: int
    """Rows left to train on, without those held out for validation."""
    lengths: Lengths


async def admit(
    spec: JobSpec,
    *,
    database: Database,
    store: Store,
    cluster: Cluster,
    settings: Settings,
    clock: Clock | None = None,
) -> tuple[RunSpec, DatasetReport]:
    """The job with every number decided, under a new id, and the report on its training file.

    Reads the files whole, in a thread: seconds for a large one.

    Raises:
        InvalidSpec, InvalidData, ModelNotFound: the job cannot run; `param` names the field.
        Unavailable: the cluster cannot be asked what it has.
    """
    _require_trackers(spec)
    _require_quantizer(spec)
    sampled_checks.require_verifiers(spec)
    model = await resolve(spec.model, database=database, store=store, settings=settings)
    named = await files_of(spec, database, clock)
    choices.max_length(spec, model.max_length)
    notes: tuple[str, ...] = ()
    if settings.inspect_models:
        notes = await asyncio.to_thread(inspected, spec, model, named, lambda file: store.path(file.key))
    _require_capacity(spec, await _capacity(cluster))
    reward_model = None
    if isinstance(spec.judge, RewardModelJudgeSpec):
        reward_model = await resolve_reward_model(spec.judge, database=database, store=store, settings=settings)
    found = await asyncio.to_thread(
        consider, spec, model, named, lambda file: store.path(file.key), reward_model=reward_model
    )
    await keep(model.source, store)
    return found.run, found.report.model_copy(update={"warnings": (*notes, *found.report.warnings)})


def inspected(spec: JobSpec, model: ModelFacts, named: Files, place: Place) -> tuple[str, ...]:
    """What transformers notes of the model and of the job on it; raises as `inspection`."""
    return inspection(spec, model, named, place).notes


def inspection(spec: JobSpec, model: ModelFacts, named: Files, place: Place, *, sized: bool = False) -> Inspection:
    """What transformers knows of the model and of the job on it, its size where it is asked for; empty where it is not
    installed. Takes seconds, so it belongs in a thread.

    Raises:
        InvalidSpec, ModelRefused: the job cannot work on it.
    """
    try:
        quantised_as(json.loads((model.directory / "config.json").read_text()))
    except ModelRefused as error:
        raise ModelRefused(f"model {spec.model!r} cannot be trained: {error.message}", param="model") from None
    request = InspectionRequest(
        directory=str(model.directory),
        weights_here=model.weight_bytes > 0,
        lora=spec.lora,
        sized=sized,
        samples=sample_rows(place(named.training), named.training.name, spec.method.row.rows),
    )
    report = inspect_model(request) or Inspection()
    if report.faults:
        fault = report.faults[0]
        raise InvalidSpec(f"model {spec.model!r} cannot be used: {fault.message}", param=fault.param)
    return report


async def files_of(spec: JobSpec, database: Database, clock: Clock | None = None) -> Files:
    """The files that the job names. Raises InvalidSpec where one is not there or not of the kind."""

    async def one(param: str, file_id: str | None, rows: RowKind) -> File | None:
        return await _file(spec, param, file_id, rows, database, clock) if file_id is not None else None

    needed = spec.method.row.rows
    training = await one("training_file", spec.training_file, needed)
    assert training is not None
    return Files(
        training,
        await one("validation_file", spec.validation_file, needed),
        await one("mix.file", spec.mix.file if spec.mix else None, "pairs"),
    )


def consider(
    spec: JobSpec, model: ModelFacts, named: Files, place: Place, *, reward_model: ModelSource | None = None
) -> Considered:
    """The job with every number decided, from its model and files, read whole.

    Raises:
        InvalidSpec, InvalidData: the job cannot run; `param` names the field.
    """
    max_length = choices.max_length(spec, model.max_length)
    tokenizer, seed = Tokenizer.load(model.directory), choices.seed(spec)
    admissible = _check_rows(spec, named, place, tokenizer, max_length, seed)
    run = choices.decide(
        spec,
        job_id=ids.new_job_id(),
        source=model.source,
        training=named.training,
        validation=named.validation,
        mix=named.mix,
        reward_model=reward_model,
        rows=admissible.train_rows,
        max_length=max_length,
        layer_width=model.layer_width,
        router_coef=model.router_coef,
        seed=seed,
    )
    return Considered(run, _with_notes(admissible.report, run), admissible.lengths)


def _with_notes(report: DatasetReport, run: RunSpec) -> DatasetReport:
    return report.model_copy(update={"warnings": (*report.warnings, *notes(report, run.loss))})


def _require_trackers(spec: JobSpec) -> None:
    if spec.integrations and find_spec("wandb") is None:
        raise InvalidSpec(
            "the job asks for Weights & Biases, which is not installed where the service runs; "
            "pip install 'dpo-service[tracking]' there, or remove `integrations`",
            param="integrations",
        )


def _require_quantizer(spec: JobSpec) -> None:
    if spec.lora is not None and spec.lora.quantize != "none" and find_spec("bitsandbytes") is None:
        raise InvalidSpec(
            "lora.quantize needs bitsandbytes, which is not installed where the service runs; "
            "pip install 'dpo-service[quantize]' there, or set lora.quantize to none",
            param="lora.quantize",
        )


async def _file(
    spec: JobSpec, param: str, file_id: str, needed: RowKind, database: Database, clock: Clock | None
) -> File:
    """A file that was uploaded for training and holds the kind of rows that is needed."""
    try:
        async with database.begin() as session:
            file = await files.get(session, file_id, now=(clock or SystemClock()).now())
    except NotFound as error:
        raise InvalidSpec(error.message, param=param) from None
    if file.purpose != PURPOSE:
        raise InvalidSpec(
            f"file {file_id!r} was uploaded with purpose {file.purpose!r}; upload it again with purpose {PURPOSE!r}",
            param=param,
        )
    held = cast(RowKind, file.rows)
    if file.rows is not None and not usable(held, needed):
        raise InvalidSpec(
            f"{_who_needs(spec, param)} needs {NEEDS[needed]}, and {file.name!r} ({file_id}) holds "
            f"{HOLDS[held]}; give another file{_other_method(held, param)}",
            param=param,
        )
    return file


def _other_method(held: RowKind, param: str) -> str:
    return f", or method {TAKES[held]!r}" if param != "mix.file" else ""


def _who_needs(spec: JobSpec, param: str) -> str:
    return "mix" if param == "mix.file" else f"method {spec.method.type!r}"


def _check_rows(
    spec: JobSpec,
    named: Files,
    place: Place,
    tokenizer: Tokenizer,
    max_length: int,
    seed: int,
) -> _Usable:
    """Read all files, and decide as the data stage will which rows are left to train on."""
    room = sampled_choices.answer_room(spec, max_length)

    def read(param: str, file: File, rows: RowKind | None = None) -> tuple[Facts, Format]:
        with _blaming(param):
            return examine(
                place(file),
                file.name,
                rows=rows or spec.method.row.rows,
                tokenizer=tokenizer,
                max_length=max_length,
                truncation=spec.truncation,
                answer_room=0 if rows else room,
            )

    held = None
    if named.validation is not None:
        held, found = read("validation_file", named.validation)
        with _blaming("validation_file"):
            require_rows(report(decide(held, deduplicate=spec.deduplicate), found), named.validation.name, minimum=1)
    facts, found = read("training_file", named.training)
    prompts = sampled_choices.sampled(spec)
    facts = decide(facts, deduplicate=spec.deduplicate, validation=held, held_prompts=prompts)
    made = report(facts, found)
    with _blaming("training_file"):
        require_rows(made, named.training.name)
    sampled_checks.require_references(spec, made)
    held_out = _held_out(facts, spec.eval.split, seed, made.kept)
    evaluated = facts[held_out] if held is None else held
    _require_comparable(spec, evaluated)
    if named.mix is not None:
        pairs, found = read("mix.file", named.mix, "pairs")
        pairs = decide(pairs, deduplicate=spec.deduplicate, validation=evaluated, held_prompts=True)
        with _blaming("mix.file"):
            require_rows(report(pairs, found), named.mix.name)
    if spec.method.row.rows == "unpaired":
        _require_mismatches(facts, held_out, seed)
        if held is not None:
            with _blaming("validation_file"):
                mismatched_rows(held["prompt"][held["reason"] == 0], seed)
    train_rows = made.kept - int(held_out.sum())
    unpaired = spec.method.row.rows == "unpaired"
    return _Usable(made, train_rows, Lengths.of(facts, train_rows, room, mismatched=unpaired))


def _require_comparable(spec: JobSpec, held: Facts) -> None:
    """Raises InvalidSpec where held-out prompts are not what the judge can say something of."""
    if len(held):
        param = "validation_file" if spec.validation_file is not None else "eval.split"
        sampled_checks.require_comparable(spec, int(held["reference"].sum()), param)


def _require_mismatches(facts: Facts, held_out: Mask, seed: int) -> None:
    """Both sides of the split must have rows of different prompts."""
    with _blaming("training_file"):
        mismatched_rows(facts["prompt"][(facts["reason"] == 0) & ~held_out], seed)
    if held_out.any():
        with _blaming("eval.split"):
            mismatched_rows(facts["prompt"][held_out], seed)


def _held_out(facts: Facts, split: float, seed: int, kept: int) -> Mask:
    """Which of the training file's rows will validate."""
    if split == 0:
        return np.zeros(len(facts), bool)
    with _blaming("eval.split"):
        mask = hold_out(facts, split, seed)
    held = int(mask.sum())
    if kept - held < MIN_ROWS:
        raise InvalidData(
            f"eval.split {split} holds out {held} of {kept} usable rows and leaves {kept - held} to train on, which "
            f"needs at least {MIN_ROWS}; choose a smaller share, or give a validation_file",
            param="eval.split",
        )
    return mask


@contextmanager
def _blaming(param: str) -> Iterator[None]:
    """An error in the rows names the field through which they came."""
    try:
        yield
    except InvalidData as error:
        error.param = error.param or param
        raise


async def _capacity(cluster: Cluster) -> Capacity:
    try:
        return await cluster.capacity()
    except ClusterError as error:
        raise Unavailable(f"the cluster cannot be asked what it has: {error.message}; try again shortly") from error


def _require_capacity(spec: JobSpec, capacity: Capacity) -> None:
    _require_workers(spec.resources, capacity)
    if sampled_choices.sampled(spec):
        sampled_checks.require_room(spec, capacity)


def _require_workers(wanted: ResourceSpec, capacity: Capacity) -> None:
    gpus, cpus = wanted.workers * wanted.gpus_per_worker, wanted.workers * wanted.cpus_per_worker
    if gpus > capacity.gpus:
        fewer = "set gpus_per_worker to 0 to train on CPUs" if capacity.gpus < 1 else f"use at most {capacity.gpus:.0f}"
        raise InvalidSpec(
            f"{wanted.workers} workers with {wanted.gpus_per_worker} GPU each need {gpus} GPUs; "
            f"the cluster has {capacity.gpus:.0f}; {fewer}",
            param="resources.gpus_per_worker" if capacity.gpus < 1 else "resources.workers",
        )
    if cpus > capacity.cpus:
        workers = int(capacity.cpus // wanted.cpus_per_worker)
        fewer = f"use at most {workers} workers" if workers else f"use at most {capacity.cpus:.0f} CPUs per worker"
        raise InvalidSpec(
            f"{wanted.workers} workers with {wanted.cpus_per_worker} CPUs each need {cpus} CPUs; "
            f"the cluster has {capacity.cpus:.0f}; {fewer}",
            param="resources.workers" if workers else "resources.cpus_per_worker",
        )
