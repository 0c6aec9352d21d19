"""A request that makes something is done once, however often it is sent.

    Idempotency-Key          the answer is kept at least KEPT_S; the same key with another body is 409
    x-stainless-retry-count  the client library repeats a request without a key: one with the same body within RETRIED_S
                             gets the first one's answer

What was answered is committed in the transaction that makes the thing: either both are there or neither. Of two at
once, one waits for the other in this process; between processes the primary key decides, and the loser reads what the
winner committed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fastapi import Request
from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_service import ids
from dpo_service.api.deps import Services
from dpo_service.errors import Conflict, UserError
from dpo_service.registry.tables import AnsweredRequest

KEPT_S = 48 * 3600
RETRIED_S = 120
MAX_KEY = 255
Make = Callable[[AsyncSession], Awaitable[tuple[str, dict[str, Any]]]]
"""Makes the thing in the given transaction; returns its id and the answer."""


@dataclass(frozen=True)
class Once:
    """What identifies a request."""

    key: str | None
    """Hash over caller, path and Idempotency-Key; None without one."""
    body_hash: str
    """Hash over caller, path and body."""
    retried: bool

    @classmethod
    async def of(cls, request: Request) -> Once:
        """Raises UserError: the key is too long or empty."""
        given = request.headers.get("idempotency-key")
        if given is not None and not 0 < len(given) <= MAX_KEY:
            raise UserError(f"Idempotency-Key must have 1 to {MAX_KEY} characters", param="Idempotency-Key")
        who = f"{request.state.caller}\0{request.method} {request.url.path}\0".encode()
        count = request.headers.get("x-stainless-retry-count", "0")
        return cls(
            key=hashlib.sha256(who + given.encode()).hexdigest() if given is not None else None,
            body_hash=hashlib.sha256(who + await request.body()).hexdigest(),
            retried=count.isdecimal() and int(count) > 0,
        )


async def answer(services: Services, once: Once) -> dict[str, Any] | None:
    """What this request was answered before, or None.

    Raises:
        Conflict: its key was used with another body.
    """
    async with services.database.begin() as session:
        return await _known(session, services, once)


async def make(services: Services, once: Once, make: Make) -> dict[str, Any]:
    """Make the thing and commit the answer beside it; when this returns, both are durable."""
    try:
        async with services.database.begin() as session:
            await _forget_old(session, services)
            known = await _known(session, services, once)
            if known is not None:
                return known
            resource_id, response = await make(session)
            session.add(_row(services, once, resource_id, response))
            await session.flush()
            return response
    except IntegrityError:
        known = await answer(services, once)
        if known is None:
            raise
        return known


@asynccontextmanager
async def one_at_a_time(services: Services, once: Once) -> AsyncIterator[None]:
    """Hold back a repetition until the request it repeats has been answered."""
    async with services.creating.setdefault(once.key or once.body_hash, asyncio.Lock()):
        yield


async def _known(session: AsyncSession, services: Services, once: Once) -> dict[str, Any] | None:
    now = services.clock.now()
    if once.key is not None:
        row = await session.get(AnsweredRequest, once.key)
        if row is not None and row.created_at > now - timedelta(seconds=KEPT_S):
            if row.body_hash != once.body_hash:
                raise Conflict("this Idempotency-Key was used with another body; use a new one for a new request")
            return row.response
    elif once.retried:
        since = now - timedelta(seconds=RETRIED_S)
        query = select(AnsweredRequest).where(
            AnsweredRequest.body_hash == once.body_hash, AnsweredRequest.created_at > since
        )
        row = await session.scalar(query.order_by(AnsweredRequest.created_at.desc()).limit(1))
        return row.response if row is not None else None
    return None


def _row(services: Services, once: Once, resource_id: str, response: dict[str, Any]) -> AnsweredRequest:
    return AnsweredRequest(
        key=once.key or f"unkeyed:{ids.random_suffix(32)}",
        body_hash=once.body_hash,
        resource_id=resource_id,
        response=response,
        created_at=services.clock.now(),
    )


async def _forget_old(session: AsyncSession, services: Services) -> None:
    """Drop answers that need not be kept any longer."""
    limit = services.clock.now() - timedelta(seconds=KEPT_S)
    await session.execute(delete(AnsweredRequest).where(AnsweredRequest.created_at <= limit))
