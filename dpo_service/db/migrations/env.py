"""Alembic's entry. It runs on the connection that db/migrate.py opened, within its transaction.

The one place in db/ that knows the packages above it: their tables together are the schema.
"""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext

# Imported for their effect: each adds its tables to Base.metadata.
import dpo_service.deployments.tables
import dpo_service.jobs.tables
import dpo_service.registry.tables  # noqa: F401
from dpo_service.db.base import Base, UtcDateTime


def _render(kind: str, item: Any, _context: AutogenContext) -> str | Literal[False]:
    """Migrations outlive our column types, so they name SQLAlchemy's."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    compare_type=True,
    transactional_ddl=True,
    render_item=_render,
)
with context.begin_transaction():
    context.run_migrations()
