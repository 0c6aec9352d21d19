"""What a user may do: have a model served, have it taken away. Both answer at once; the reconciler does the rest."""

from __future__ import annotations

from sqlalchemy.exc import IntegrityError

from dpo_service.clock import Clock
from dpo_service.cluster.port import Cluster
from dpo_service.db.session import Database
from dpo_service.deployments import repository
from dpo_service.deployments.tables import Deployment, DeploymentState
from dpo_service.errors import ClusterError, InvalidSpec, Unavailable
from dpo_service.registry.models import ModelFacts, keep, resolve
from dpo_service.settings import Settings
from dpo_service.specs.run import ModelSource
from dpo_service.specs.serve import EngineRequest
from dpo_service.storage.store import Store


async def create(
    model: str,
    engine: EngineRequest,
    *,
    database: Database,
    store: Store,
    settings: Settings,
    cluster: Cluster,
    clock: Clock,
) -> tuple[Deployment, bool]:
    """Write down that `model` is to be served. Asked again, it is the same deployment.

    Returns:
        the deployment, and whether it is new.

    Raises:
        ModelNotFound: the name stands for no causal language model with weights.
        InvalidSpec: an engine setting the model or the cluster cannot meet.
        Conflict: it is deployed with other engine settings.
        Unavailable: the cluster cannot say how many GPUs it has.
    """
    async with database.begin() as session:
        live = await repository.find_live(session, model)
        if live is not None and live.state != DeploymentState.FAILED:
            repository.require_same_engine(live, engine)
            return live, False
    facts = await resolve(model, database=database, store=store, settings=settings)
    _require_length(engine, facts)
    await _require_gpus(engine, cluster)
    await keep(facts.source, store)
    for last_try in (False, True):
        try:
            async with database.begin() as session:
                return await repository.ensure(
                    session,
                    model=model,
                    model_path=model_path(facts.source, store),
                    digest=facts.digest,
                    engine=engine,
                    now=clock.now(),
                )
        except IntegrityError:
            # Another request was faster; its row is found now.
            if last_try:
                raise
    raise AssertionError("unreachable")


async def delete(name: str, *, database: Database, clock: Clock) -> Deployment:
    """Take a deployment, named by its id or its model, away. Doing so again is fine while it is going.

    Raises:
        NotFound: there is none.
    """
    async with database.begin() as session:
        row = await repository.get(session, name)
        if row.state != DeploymentState.DELETING:
            await repository.move(session, row, DeploymentState.DELETING, "Being taken away", clock.now())
        return row


def model_path(source: ModelSource, store: Store) -> str:
    """What a replica loads: an absolute directory, or a hub id."""
    if source.key is not None:
        return str(store.path(source.key))
    path = source.path or source.hub
    assert path is not None
    return path


def _require_length(engine: EngineRequest, facts: ModelFacts) -> None:
    if engine.max_model_len is not None and engine.max_model_len > facts.max_length:
        raise InvalidSpec(
            f"engine.max_model_len is {engine.max_model_len}, but {facts.source.name} allows at most "
            f"{facts.max_length} tokens; give that or less, or leave it out",
            param="engine.max_model_len",
        )


async def _require_gpus(engine: EngineRequest, cluster: Cluster) -> None:
    if not engine.gpus:
        return
    try:
        capacity = await cluster.capacity()
    except ClusterError as error:
        raise Unavailable(f"the cluster does not say how many GPUs it has: {error.message}") from error
    if engine.gpus > capacity.gpus:
        raise InvalidSpec(
            f"engine.gpus is {engine.gpus}, but the cluster has {capacity.gpus:g}; "
            "ask for at most that, or leave it out",
            param="engine.gpus",
        )
