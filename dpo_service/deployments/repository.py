"""Reading and writing the table of deployments. Functions take a session and never commit."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.deployments.tables import LIVE, Deployment, DeploymentState
from dpo_service.errors import Conflict, NotFound, UserError
from dpo_service.ids import new_deployment_id
from dpo_service.specs.serve import EngineRequest


async def find_live(session: AsyncSession, model: str) -> Deployment | None:
    """The deployment that holds the name `model`, in whatever state it is."""
    query = select(Deployment).where(Deployment.model == model, Deployment.state.in_(LIVE))
    found: Deployment | None = await session.scalar(query)
    return found


async def get(session: AsyncSession, name: str) -> Deployment:
    """By id, or the live one of a model. Raises NotFound."""
    row = await session.get(Deployment, name)
    if row is None or row.state == DeploymentState.DELETED:
        row = await find_live(session, name)
    if row is None:
        raise NotFound(f"there is no deployment {name!r}; see GET /v1/deployments", param="deployment_id")
    return row


async def page(session: AsyncSession, after: str | None, limit: int) -> tuple[list[Deployment], bool]:
    """At most `limit` that are not deleted, newest first, and whether more follow.

    Raises:
        UserError: `after` names no deployment.
    """
    query = select(Deployment).where(Deployment.state != DeploymentState.DELETED)
    if after is not None:
        cursor = await session.get(Deployment, after)
        if cursor is None:
            raise UserError(f"after: there is no {after!r}; give the id of the last entry you have", param="after")
        query = query.where(tuple_(Deployment.created_at, Deployment.id) < (cursor.created_at, cursor.id))
    query = query.order_by(Deployment.created_at.desc(), Deployment.id.desc()).limit(limit + 1)
    rows = list(await session.scalars(query))
    return rows[:limit], len(rows) > limit


async def to_reconcile(session: AsyncSession) -> Sequence[Deployment]:
    """All that are meant to be there, or not gone yet; oldest first."""
    query = select(Deployment).where(Deployment.state != DeploymentState.DELETED)
    return list(await session.scalars(query.order_by(Deployment.created_at, Deployment.id)))


async def ensure(
    session: AsyncSession,
    *,
    model: str,
    model_path: str,
    digest: str | None,
    engine: EngineRequest,
    now: datetime,
) -> tuple[Deployment, bool]:
    """The live deployment of `model`, made if there is none, and whether it was made. A failed one makes way.

    Raises:
        Conflict: there is one with other engine settings.
    """
    live = await find_live(session, model)
    if live is not None and live.state != DeploymentState.FAILED:
        require_same_engine(live, engine)
        return live, False
    if live is not None:
        await move(session, live, DeploymentState.DELETING, "Replaced by a new deployment", now)
    row = Deployment(
        id=new_deployment_id(),
        model=model,
        model_path=model_path,
        digest=digest,
        engine=engine.model_dump(mode="json"),
        state=DeploymentState.PENDING.value,
        message="Waiting for the cluster",
        created_at=now,
        updated_at=now,
    )
    session.add(row)
    await session.flush()
    return row, True


def require_same_engine(row: Deployment, asked: EngineRequest) -> None:
    """Raises Conflict when `asked` names a setting that `row` has otherwise."""
    wanted = asked.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    other = [name for name, value in wanted.items() if row.engine.get(name) != value]
    if other:
        raise Conflict(
            f"model {row.model!r} is deployed as {row.id} with another {', '.join(other)}; "
            f"DELETE /v1/deployments/{row.id} first",
            param=f"engine.{other[0]}",
        )


async def move(session: AsyncSession, row: Deployment, to: DeploymentState, message: str, now: datetime) -> bool:
    """Move `row` from the state it was read in. False, and nothing is written, when it is no longer in that."""
    values: dict[str, Any] = {"state": to.value, "message": message}
    if to != row.state:
        values["updated_at"] = now
    return await _write(session, row, values)


async def set_engine(session: AsyncSession, row: Deployment, engine: dict[str, Any]) -> bool:
    return await _write(session, row, {"engine": engine})


async def _write(session: AsyncSession, row: Deployment, values: dict[str, Any]) -> bool:
    guarded = update(Deployment).where(Deployment.id == row.id, Deployment.state == row.state)
    result = await session.execute(guarded.values(values).returning(Deployment.id))
    return result.first() is not None
