from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dpo_service.storage import paths
from tests.unit.jobs.admission import save_model
from tests.unit.jobs.world import POSTGRES, World, open_world, postgres_database


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
async def either(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """A world on each engine, for what depends on the engine: locks, clocks, JSON, order."""
    if request.param == "sqlite":
        async with open_world(tmp_path) as made:
            yield made
        return
    if not POSTGRES:
        pytest.skip("DPO_TEST_POSTGRES_URL names no PostgreSQL to test on")
    async with postgres_database() as url, open_world(tmp_path, url) as made:
        yield made


@pytest.fixture
def ready(world: World) -> World:
    save_model(world.store.path(paths.user_model("base")))
    return world
