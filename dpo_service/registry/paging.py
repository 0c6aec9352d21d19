"""Pages of a table, by a cursor: rows in order of (created_at, id), after the row whose id the caller saw last."""

from __future__ import annotations

from typing import Literal, TypeVar

from sqlalchemy import ColumnElement, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service.errors import UserError
from dpo_service.registry.tables import File, PublishedModel

Order = Literal["asc", "desc"]
R = TypeVar("R", File, PublishedModel)


async def page(
    session: AsyncSession,
    table: type[R],
    *where: ColumnElement[bool],
    after: str | None = None,
    limit: int = 20,
    order: Order = "desc",
) -> tuple[list[R], bool]:
    """At most `limit` rows and whether more follow.

    Raises:
        UserError: `after` names no row.
    """
    position = tuple_(table.created_at, table.id)
    query = select(table).where(*where)
    if after is not None:
        cursor = await session.get(table, after)
        if cursor is None:
            raise UserError(f"after: there is no {after!r}; give the id of the last entry you have", param="after")
        bound = (cursor.created_at, cursor.id)
        query = query.where(position < bound if order == "desc" else position > bound)
    columns = (table.created_at, table.id)
    query = query.order_by(*(c.desc() if order == "desc" else c.asc() for c in columns)).limit(limit + 1)
    rows = list(await session.scalars(query))
    return rows[:limit], len(rows) > limit
