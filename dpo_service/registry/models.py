"""Models: the ones jobs published, and what a name stands for.

A name is looked up in this order: a published id (`ft:…`, also `…:ckpt-step-N`), a directory under <data-dir>/models,
an absolute path inside an allowed root, a hub id. Symbolic links are followed first and judged by where they end.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.db.session import Database
from dpo_service.errors import ModelNotFound, NotFound
from dpo_service.ids import checkpoint_model_id
from dpo_service.registry import hub
from dpo_service.registry.directories import inspect, require_reward_model
from dpo_service.registry.tables import PublishedModel
from dpo_service.settings import Settings
from dpo_service.specs.judge import RewardModelJudgeSpec
from dpo_service.specs.run import ModelSource
from dpo_service.storage import paths
from dpo_service.storage.store import Store

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NAMES_SHOWN = 10


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before anything is loaded."""

    source: ModelSource
    directory: Path
    """Where configuration and tokenizer can be read now; with a hub id the weights are not here yet."""
    architecture: str
    max_length: int
    layer_width: int
    vocab_size: int
    has_chat_template: bool
    router_coef: float | None
    """Weight that the model gives the load-balancing loss of its experts; None = it has no such loss."""
    weight_bytes: int
    digest: str | None
    """Identity of a published model; None for the user's own."""


@dataclass(frozen=True)
class _Found:
    source: ModelSource
    directory: Path
    digest: str | None = None
    weights_here: bool = True


async def resolve(name: str, *, database: Database, store: Store, settings: Settings) -> ModelFacts:
    """What `name` stands for. Opens a short transaction of its own: a hub may take seconds, and a lock must not.

    Raises:
        ModelNotFound: nothing does, or it cannot be trained and served; says where was looked and what there is.
    """
    found = await _find(name, database, store, settings)
    return await facts_of(found.source, found.directory, digest=found.digest, weights_here=found.weights_here)


async def keep(source: ModelSource, store: Store) -> None:
    """Have a job's retention leave the checkpoint that is this model, if it is one: it is about to be used.

    Raises:
        ModelNotFound: it has just been deleted.
    """
    if source.key is None:
        return
    await asyncio.to_thread(store.write, paths.keep_flag(source.key.rpartition("/")[0]), b"")
    if not store.exists(source.key):
        raise ModelNotFound(
            f"model {source.name!r} is gone: its job keeps only the last checkpoints (checkpoint.keep_last)",
            param="model",
        )


async def resolve_reward_model(
    judge: RewardModelJudgeSpec, *, database: Database, store: Store, settings: Settings
) -> ModelSource:
    """Where the judge's model lies.

    Raises:
        ModelNotFound: nowhere, or it is no sequence-classification model with one output.
        InvalidSpec: the judge's engine does not compute it.
    """
    try:
        found = await _find(judge.model, database, store, settings)
        await asyncio.to_thread(require_reward_model, found.directory, judge)
    except ModelNotFound as error:
        error.param = "judge.model"
        raise
    return found.source


async def _find(name: str, database: Database, store: Store, settings: Settings) -> _Found:
    async with database.begin() as session:
        published = await session.get(PublishedModel, name)
    if published is not None:
        source = ModelSource(name=name, key=published.key)
        return _Found(source, store.path(published.key), published.digest)
    directory = await asyncio.to_thread(_local_directory, name, store, settings)
    if directory is not None:
        return _Found(ModelSource(name=name, path=str(directory)), directory)
    looked = [f"published models, {store.path(paths.user_model(''))}, and directories in the allowed roots"]
    if HUB_ID.fullmatch(name):
        if settings.hub and not hub.offline():
            snapshot = await hub.fetch_description(name)
            return _Found(ModelSource(name=name, hub=name), snapshot, weights_here=False)
        looked.append("the hub is turned off (DPO_HUB, HF_HUB_OFFLINE)")
    raise ModelNotFound(
        f"there is no model {name!r} (looked in {'; '.join(looked)}). {await _what_there_is(database, store)}",
        param="model",
    )


async def facts_of(
    source: ModelSource, directory: Path, *, digest: str | None = None, weights_here: bool = True
) -> ModelFacts:
    found = await asyncio.to_thread(inspect, directory, source.name, weights_here=weights_here)
    return ModelFacts(
        source=source,
        directory=directory,
        architecture=found.architecture,
        max_length=found.max_length,
        layer_width=found.layer_width,
        vocab_size=found.vocab_size,
        has_chat_template=found.has_chat_template,
        router_coef=found.router_coef,
        weight_bytes=found.weight_bytes,
        digest=digest,
    )


def _local_directory(name: str, store: Store, settings: Settings) -> Path | None:
    """The directory that `name` stands for, or None. A path outside the allowed roots is refused unseen."""
    if "\0" in name or ".." in Path(name).parts:
        raise ModelNotFound(f"model {name!r} is no name of a model: it holds '..' or a NUL", param="model")
    roots = [store.root, *(root.resolve() for root in settings.allowed_model_roots)]
    absolute = os.path.isabs(name)
    candidate = Path(name) if absolute else store.root / paths.user_model(name)
    try:
        resolved = candidate.resolve()
        inside = any(resolved.is_relative_to(root) for root in roots)
        if inside or not absolute:
            found = candidate.is_dir()
    except OSError:
        return None
    if not inside and (absolute or found):
        raise ModelNotFound(
            f"model {name!r} lies outside the allowed roots ({', '.join(map(str, roots))}); "
            "move it there, or add its root to DPO_ALLOWED_MODEL_ROOTS",
            param="model",
        )
    return resolved if found else None


def local_models(store: Store) -> dict[str, Path]:
    """The user's own model directories under <data-dir>/models, by name (`name` or `org/name`)."""
    root = store.root / paths.user_model("")
    found = [*root.glob("*/config.json"), *root.glob("*/*/config.json")]
    return {str(file.parent.relative_to(root)): file.parent for file in sorted(found)}


async def _what_there_is(database: Database, store: Store) -> str:
    async with database.begin() as session:
        query = select(PublishedModel.id).where(PublishedModel.step.is_(None))
        published = list(await session.scalars(query.order_by(PublishedModel.created_at.desc()).limit(NAMES_SHOWN)))
    names = [*published, *await asyncio.to_thread(local_models, store)]
    if not names:
        return "There are no models yet: put a directory in the Hugging Face layout there."
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"There are: {', '.join(names[:NAMES_SHOWN])}{more}."


async def publish(
    session: AsyncSession,
    model_id: str,
    *,
    job_id: str,
    key: str,
    digest: str,
    base: str,
    created_at: datetime,
    owner: str = "dpo-service",
    step: int | None = None,
) -> PublishedModel:
    """Make `model_id` a model under that id. `key` is the storage key of the model directory itself
    (checkpoint directory + "/model"). Publishing again changes nothing but the place and the digest.
    """
    row = await session.get(PublishedModel, model_id)
    if row is None:
        row = PublishedModel(id=model_id, base=base, job_id=job_id, step=step, created_at=created_at, owned_by=owner)
        session.add(row)
    row.key, row.digest = key, digest
    await session.flush()
    return row


async def publish_checkpoint(
    session: AsyncSession,
    model_id: str,
    step: int,
    *,
    job_id: str,
    key: str,
    digest: str,
    base: str,
    created_at: datetime,
) -> PublishedModel:
    """Make the checkpoint of `step` a model: `<model_id>:ckpt-step-<step>`."""
    return await publish(
        session,
        checkpoint_model_id(model_id, step),
        job_id=job_id,
        key=key,
        digest=digest,
        base=base,
        created_at=created_at,
        step=step,
    )


async def get(session: AsyncSession, model_id: str) -> PublishedModel:
    """A published model. Raises NotFound."""
    row = await session.get(PublishedModel, model_id)
    if row is None:
        raise NotFound(f"there is no model {model_id!r}; see GET /v1/models", param="model", code="model_not_found")
    return row


async def list_published(session: AsyncSession) -> Sequence[PublishedModel]:
    """All published models, newest first; checkpoints are left out, their job lists them."""
    query = select(PublishedModel).where(PublishedModel.step.is_(None))
    return list(await session.scalars(query.order_by(PublishedModel.created_at.desc(), PublishedModel.id.desc())))


async def delete(session: AsyncSession, model_id: str) -> PublishedModel:
    """Forget a published model. The caller has made sure that nothing uses it. Raises NotFound."""
    row = await get(session, model_id)
    await session.delete(row)
    await session.flush()
    return row
