"""What routes may reach: the parts the application was made with, typed. Nothing else lies in `app.state`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated
from weakref import WeakValueDictionary

from fastapi import Depends, Request

from dpo_service.clock import Clock
from dpo_service.cluster.port import Cluster
from dpo_service.db.session import Database
from dpo_service.settings import Settings
from dpo_service.storage.store import Store


@dataclass(frozen=True)
class Services:
    settings: Settings
    database: Database
    store: Store
    cluster: Cluster
    clock: Clock
    on_change: Callable[[], None]
    """Called after a commit that gives a reconciler something to do."""
    creating: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    """One lock a request body, so that a retry waits for the request it repeats (idempotency.py)."""


def services(request: Request) -> Services:
    found = request.app.state.services
    assert isinstance(found, Services)
    return found


def settings(request: Request) -> Settings:
    return services(request).settings


def database(request: Request) -> Database:
    return services(request).database


def store(request: Request) -> Store:
    return services(request).store


def cluster(request: Request) -> Cluster:
    return services(request).cluster


ServicesDep = Annotated[Services, Depends(services)]
SettingsDep = Annotated[Settings, Depends(settings)]
DatabaseDep = Annotated[Database, Depends(database)]
StoreDep = Annotated[Store, Depends(store)]
ClusterDep = Annotated[Cluster, Depends(cluster)]
