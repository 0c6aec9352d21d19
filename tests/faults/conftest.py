from tests.unit.jobs.conftest import either, world

__all__ = ["either", "world"]
