"""Online training on Ray: what the runner calls where a run samples its pairs.

    fit (driver) ── placement group ──> sampler actors (vLLM)      owned by the curator's actor: they end with it
         │                     ──> a reward model's actor (vLLM)    the same, where the job's judge is one
         ├── CuratorActor ── asks ──────────┘     ^                   they load while the workers start
         └── train.ray_worker.fit ── workers ─────┴ OnlineFeed ── RayCurator ──> CuratorActor
                                                  whole weights, on GPUs (`device_transfer`)

Who gets which device. Samplers with GPUs of their own have them by the placement group, workers have theirs by Ray
Train. Where they share, workers book theirs whole and say where they are (`join`), and each sampler is put beside one,
outside the placement group; so samplers are started when the workers are there. Samplers on GPUs are started anew
with every group of workers, which may be elsewhere, and whose dead predecessors may have left a transfer half done.

What dies and what follows. A sampler: Ray restarts it, the pool asks its prompts again (`pool`). A worker: Ray Train
starts the group again from the newest checkpoint, and the feed starts the curator there. The curator: Ray restarts its
actor, the workers' next call fails, and the same follows. The driver: Ray ends all of it with the job.

A stop is looked for by the workers between two steps, and here while they wait for pairs or samplers: a judge that is
away may keep them waiting for longer than a stop may take.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util import placement_group, remove_placement_group

from dpo_service.errors import DpoServiceError, StopAsked, TrainingError
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.online.actors import Place, RaySampler, bundles, this_place
from dpo_service.online.assemble import build_curator, build_feed, start_samplers
from dpo_service.online.evaluation import Evaluation
from dpo_service.online.feed import OnlineFeed
from dpo_service.online.judges.reward_actor import bundles as reward_bundles
from dpo_service.online.port import Weights
from dpo_service.online.steps import StepPairs
from dpo_service.online.turn import Turn
from dpo_service.online.weights import remove_orphans
from dpo_service.specs.run import AttemptSpec, RunSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store
from dpo_service.train import ray_worker
from dpo_service.train.loop import TrainOutcome
from dpo_service.train.ranks import Ranks

CALLS_AT_ONCE = 64
MAX_CURATOR_RESTARTS = 3
LOOK_S = 0.5
"""How often the stop flag is looked for while something is waited for."""
CLOSING_S = 30.0
START = (-1, 0)
"""Stands for the start among the steps that are given or refused."""
RESTARTED = "this actor was restarted: the trainer has to start it again"


def fit(
    store: Store, attempt: AttemptSpec, dataset: DatasetManifest, model_dir: Path, base_digest: str
) -> TrainOutcome:
    """As `train.ray_worker.fit`, for a run whose pairs are sampled. No actor and no weights in shared memory are left
    behind, however it ends.

    Raises:
        StopAsked: before there was room for the samplers.
        TrainingError: as `ray_worker.fit`, and where sampling or judging failed for good.
    """
    run = attempt.run
    assert run.online is not None, "the runner asks only for runs that sample"
    ray_worker.start_ray()
    wanted = [*bundles(run.online.samplers), *reward_bundles(run.online.judge)]
    stop, turn = store.path(paths.stop_flag(run.job_id, attempt.attempt)), Turn(store.path(paths.STARTING))
    placement = curator = None
    try:
        _wait_for(turn.take, stop)
        if wanted:
            placement = placement_group(wanted, strategy="PACK")
            _wait_for(partial(placement.wait, LOOK_S), stop)
        config = CuratorConfig(str(store.root), run.job_id, attempt.attempt, dataset, str(model_dir))
        options = {"num_cpus": 0, "max_restarts": MAX_CURATOR_RESTARTS, "max_concurrency": CALLS_AT_ONCE}
        curator = ray.remote(**options)(CuratorActor).remote(config, placement)
        if not run.online.samplers.shares_device:
            curator.prepare.remote()
        threading.Thread(target=_give_back, args=(turn, curator), daemon=True).start()
        return ray_worker.fit(store, attempt, dataset, model_dir, base_digest, feed=CuratorFeed(curator))
    finally:
        if curator is not None:
            _end(curator)
        if placement is not None:
            remove_placement_group(placement)
        turn.give_back()
        remove_orphans()
        store.delete(paths.weights_dir(run.job_id))


def _wait_for(ready: Callable[[], bool], stop: Path) -> None:
    while not ready():
        if stop.exists():
            raise StopAsked("asked to stop while there was no room for the samplers")
        time.sleep(LOOK_S)


def _give_back(turn: Turn, curator: Any) -> None:
    """Once the workers run, or never will."""
    with contextlib.suppress(Exception):
        ray.get(curator.begun.remote())
    turn.give_back()


def _end(curator: Any) -> None:
    """End the curator and its samplers; by force, where it does not answer."""
    with contextlib.suppress(Exception):
        ray.get(curator.close.remote(), timeout=CLOSING_S)
    ray.kill(curator, no_restart=True)


@dataclass(frozen=True)
class CuratorConfig:
    """What the curator is told; it reads the rest from storage."""

    root: str
    job_id: str
    attempt: int
    dataset: DatasetManifest
    model_dir: str


class CuratorActor:
    """The process of a curator. What it raises, it raises under a name that a worker can leave for the driver."""

    def __init__(self, config: CuratorConfig, placement: Any) -> None:
        self._config, self._placement = config, placement
        self._store = Store(config.root)
        self._stop = self._store.path(paths.stop_flag(config.job_id, config.attempt))
        self._begun = asyncio.Event()
        self._building: asyncio.Task[Any] | None = None
        self._curator: Any = None
        self._given: dict[tuple[int, int], bool] = {}
        """Steps, each time they were asked for, whose pairs a rank has got (True), or was refused because of a stop."""
        self._places: dict[int, Place] = {}
        self._handles: list[Any] = []
        self._taken = False
        """A group of workers has had the samplers."""

    async def join(self, rank: int, place: Place) -> None:
        """The worker of `rank` computes there."""
        self._places[rank] = place

    async def samplers(self) -> list[Any]:
        """As `steps.CuratorClient.samplers`.

        Raises:
            StopAsked: before they were there.
        """
        self._begun.set()
        self._given = {}
        with _named():
            await self._unless_stopped(self._untaken())
        return self._handles

    async def _untaken(self) -> None:
        if self._taken:
            await self.close()
            self._building = None
        self._taken = True
        self._curator = await asyncio.shield(self._build())

    async def prepare(self) -> None:
        """Load the samplers. What fails of it is raised by `start`."""
        await asyncio.wait([self._build()])

    async def begun(self) -> None:
        """Returns when the trainer has called `start`: all of its workers are there."""
        await self._begun.wait()

    async def start(self, step: int, weights: Weights | None, counters: Mapping[str, Any]) -> None:
        """As `Curator.start`; the samplers are loaded first, unless they are there.

        Raises:
            StopAsked: before it was done.
        """
        self._begun.set()
        with _named():
            await self._unless_stopped(self._start(step, weights, counters))

    async def _start(self, step: int, weights: Weights | None, counters: Mapping[str, Any]) -> None:
        self._given = {}  # who asked before the trainer was restarted decides nothing any more
        self._curator = await asyncio.shield(self._build())
        await self._curator.start(step, weights, counters)

    async def pairs(self, step: int, sent: int = 0) -> StepPairs | None:
        """As `Curator.pairs`.

        Raises:
            StopAsked: before they were there; of a step it is raised for all ranks, or for none.
        """
        assert self._curator is not None, RESTARTED
        with _named():
            work = self._curator.pairs(step, sent)
            made: StepPairs | None = await self._unless_stopped(work, (step, sent))
            return made

    async def published(self, weights: Weights, lent: bool = False) -> None:
        assert self._curator is not None, RESTARTED
        await self._curator.published(weights, lent)

    async def evaluate(self, step: int) -> Evaluation:
        assert self._curator is not None, RESTARTED
        with _named():
            found: Evaluation = await self._curator.evaluate(step)
            return found

    async def close(self) -> None:
        if self._building is None:
            return
        self._building.cancel()
        with contextlib.suppress(asyncio.CancelledError, DpoServiceError):
            await (await self._building).close()

    async def _unless_stopped(self, work: Awaitable[Any], step: tuple[int, int] = START) -> Any:
        """What `work` for `step` gives. Of one step all ranks get what the first one got: it, or StopAsked."""
        given, asked = self._given, asyncio.ensure_future(work)
        try:
            while True:
                await asyncio.wait([asked], timeout=LOOK_S)
                if step not in given and (asked.done() or self._stop.exists()):
                    given[step] = asked.done()
                if given.get(step) is False:
                    raise StopAsked("asked to stop while pairs were waited for")
                if asked.done():
                    return asked.result()
        finally:
            asked.cancel()

    def _build(self) -> asyncio.Task[Any]:
        """The curator, which is made once."""
        if self._building is None:
            self._building = asyncio.create_task(self._built())
        return self._building

    async def _built(self) -> Any:
        config, store = self._config, self._store
        run = store.read_model(paths.attempt_spec(config.job_id, config.attempt), AttemptSpec).run
        assert run.online is not None, "the driver has seen to it"
        model_dir = Path(config.model_dir)
        shared = run.online.samplers.shares_device
        beside = [self._places[rank] for rank in range(run.resources.workers)] if shared else []
        sampler = await start_samplers(run.online, model_dir, self._placement, beside)
        try:
            curator = build_curator(run, config.dataset, store, model_dir, sampler, self._placement)
        except BaseException:
            await sampler.close()
            raise
        sampler.on_lacking = curator.lacking
        self._handles = [one.sampler.handle for one in sampler.members if isinstance(one.sampler, RaySampler)]
        return curator


@contextlib.contextmanager
def _named() -> Any:
    """Errors as classes of `ray_worker.ERRORS`, which are made of a sentence alone and so come through Ray whole."""
    try:
        yield
    except StopAsked:
        raise
    except TrainingError as error:
        raise ray_worker.ERRORS[ray_worker.name_of(error)](error.message) from error
    except DpoServiceError as error:
        raise TrainingError(error.message) from error


class RayCurator:
    """A `CuratorClient` whose curator is in an actor.

    A call raises what the curator raised, where that is one of the service's own errors: it ends the run. Anything else
    (the actor has died, or was restarted and knows nothing) fails the worker, and Ray Train starts the group again.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def join(self, rank: int) -> None:
        _ask(self._handle.join.remote(rank, this_place()))

    def samplers(self) -> Sequence[Any]:
        handles: list[Any] = _ask(self._handle.samplers.remote())
        return handles

    def start(self, step: int, weights: Weights | None, counters: Mapping[str, Any]) -> None:
        _ask(self._handle.start.remote(step, weights, counters))

    def pairs(self, step: int, sent: int = 0) -> StepPairs | None:
        made: StepPairs | None = _ask(self._handle.pairs.remote(step, sent))
        return made

    def published(self, weights: Weights, lent: bool = False) -> None:
        _ask(self._handle.published.remote(weights, lent))

    def evaluate(self, step: int) -> Evaluation:
        found: Evaluation = _ask(self._handle.evaluate.remote(step))
        return found


def _ask(reply: Any) -> Any:
    try:
        return ray.get(reply)
    except RayTaskError as error:
        if isinstance(error.cause, DpoServiceError):
            raise error.cause from error
        raise


@dataclass(frozen=True)
class CuratorFeed:
    """Makes a worker's feed (`ray_worker.FeedFactory`)."""

    handle: Any

    def __call__(self, run: RunSpec, dataset: DatasetManifest, store: Store, ranks: Ranks) -> OnlineFeed:
        return build_feed(run, dataset, store, RayCurator(self.handle), ranks)
