"""Admission without creating: what a job would need and take, on a device that need not be there.

JobSpec ── model, files: of the service, or of this machine ── admit.consider ── planning ──> Planned
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import psutil

from dpo_service.clock import Clock
from dpo_service.db.session import Database
from dpo_service.errors import InvalidSpec, ModelNotFound
from dpo_service.jobs.admit import Files, Place, consider, files_of, inspection
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.manifests.inspection import Inspection
from dpo_service.planning.plan import Plan, device, device_of, make_plan
from dpo_service.planning.shape import read_shape
from dpo_service.registry import hub
from dpo_service.registry.models import HUB_ID, ModelFacts, facts_of, resolve
from dpo_service.registry.tables import File
from dpo_service.settings import Settings
from dpo_service.specs.job import JobSpec
from dpo_service.specs.run import ModelSource, RunSpec
from dpo_service.storage.store import Store

CPU = "cpu"


@dataclass(frozen=True)
class Planned:
    run: RunSpec
    report: DatasetReport
    plan: Plan


async def plan_job(
    spec: JobSpec,
    *,
    gpu: str | None,
    gpus: int | None,
    database: Database,
    store: Store,
    settings: Settings,
    clock: Clock | None = None,
) -> Planned:
    """The plan of a job as it would be submitted to this service; `gpu` and `gpus` in the place of what it asks for.

    Raises:
        InvalidSpec, InvalidData, ModelNotFound: the job would be refused; `param` names the field.
    """
    spec = on(spec, gpu, gpus)
    model = await resolve(spec.model, database=database, store=store, settings=settings)
    named = await files_of(spec, database, clock)
    return await asyncio.to_thread(
        _planned, spec, gpu, model, named, lambda file: store.path(file.key), inspect=settings.inspect_models
    )


async def plan_here(spec: JobSpec, *, gpu: str | None, gpus: int | None) -> Planned:
    """The same without a service: the model is a directory or a hub id, the files are paths. Raises as `plan_job`."""
    spec = on(spec, gpu, gpus)
    model = await _model_here(spec.model)
    named = Files(
        _file_here(spec.training_file),
        _file_here(spec.validation_file) if spec.validation_file else None,
        _file_here(spec.mix.file) if spec.mix else None,
    )
    return await asyncio.to_thread(_planned, spec, gpu, model, named, lambda file: Path(file.key))


def on(spec: JobSpec, gpu: str | None, gpus: int | None) -> JobSpec:
    """`spec` on `gpus` devices of the kind `gpu`, where they are named."""
    asked: dict[str, int] = {}
    if gpus is not None:
        asked["workers"] = gpus
    if gpu is not None:
        asked["gpus_per_worker"] = int(device(gpu).cuda)
    return spec.model_copy(update={"resources": spec.resources.model_copy(update=asked)})


def _planned(
    spec: JobSpec, gpu: str | None, model: ModelFacts, named: Files, place: Place, *, inspect: bool = True
) -> Planned:
    report = inspection(spec, model, named, place, sized=True) if inspect else Inspection()
    shape = read_shape(model.directory, spec.model, report.size)
    found = consider(spec, model, named, place)
    kind = device(gpu or device_of(found.run))
    memory = psutil.virtual_memory().total
    plan = make_plan(spec, found.run, shape, found.lengths, kind, memory)
    return Planned(found.run, found.report, plan.model_copy(update={"notes": (*report.notes, *plan.notes)}))


async def _model_here(name: str) -> ModelFacts:
    directory = Path(name)
    if directory.is_dir():
        return await facts_of(ModelSource(name=name, path=str(directory)), directory)
    if HUB_ID.fullmatch(name) and not hub.offline():
        return await facts_of(ModelSource(name=name, hub=name), await hub.fetch_description(name), weights_here=False)
    raise ModelNotFound(
        f"there is no directory {name!r} here, and it is no hub id; a service's models are planned with --url",
        param="model",
    )


def _file_here(name: str) -> File:
    """A file of this machine in the shape of an uploaded one; nothing is stored."""
    path = Path(name)
    if not path.is_file():
        raise InvalidSpec(
            f"there is no file {name!r} here; uploaded ones are planned with --url", param="training_file"
        )
    return File(id=name, name=path.name, key=str(path))
