import pytest

from tests.unit.online.judges.openai_kit import serving


@pytest.fixture
async def server():
    async with serving() as running:
        yield running
