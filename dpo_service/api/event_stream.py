"""A job's events as server-sent events: what there is, then what comes, until the job has ended.

    look ──> events after the last sequence? ── yes ──> send them, look again at once
      ^              │ no
      │              ├── the job had ended when we looked ──> end
      └── wait ──────┘   (a comment every HEARTBEAT_S, so that proxies keep the line open)

The state is read in the transaction that reads the events: an ended job with no more events has none to come, but for
reports that arrive late, and those are in the list of events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from dpo_service.api.deps import Services
from dpo_service.api.schemas.jobs import EventObject
from dpo_service.jobs import repository
from dpo_service.jobs.states import TERMINAL

MEDIA_TYPE = "text/event-stream"
LOOK_EVERY_S = 0.5
HEARTBEAT_S = 15.0


async def stream_events(services: Services, job_id: str, sequence: int) -> AsyncIterator[str]:
    """The events after `sequence`, each with its sequence as the id, so that a client can take the stream up again."""
    spoke = time.monotonic()
    while True:
        async with services.database.begin() as session:
            job = await repository.get_job(session, job_id)
            events = await repository.events_since(session, job_id, sequence)
        for event in events:
            sequence = event.sequence
            yield f"id: {sequence}\nevent: {event.type}\ndata: {EventObject.of(event).model_dump_json()}\n\n"
        if events:
            spoke = time.monotonic()
            continue
        if job.job_state in TERMINAL:
            yield "data: [DONE]\n\n"
            return
        if time.monotonic() - spoke > HEARTBEAT_S:
            spoke = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(LOOK_EVERY_S)
