"""The database's own clock, in SQL: leases are measured by it, because the clocks of two replicas may differ."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ColumnElement

from dpo_service.db.base import UtcDateTime


class DatabaseTime(ColumnElement[datetime]):
    """The moment the statement runs, plus `offset_s` seconds."""

    type = UtcDateTime()
    inherit_cache = False

    def __init__(self, offset_s: float = 0.0) -> None:
        self.offset_s = float(offset_s)


@compiles(DatabaseTime, "sqlite")
def _sqlite(element: DatabaseTime, _compiler: SQLCompiler, **_: Any) -> str:
    # The text format in which SQLAlchemy stores a DateTime, so that the two compare as strings.
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', '{element.offset_s:+.3f} seconds')"


@compiles(DatabaseTime, "postgresql")
def _postgresql(element: DatabaseTime, _compiler: SQLCompiler, **_: Any) -> str:
    # Not now(), which stands still within a transaction.
    return f"(clock_timestamp() + interval '{element.offset_s:.3f} seconds')"
