"""Jobs that can be paused, and failures counted apart from attempts"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Of a job from before, every attempt but the newest had failed; of a queued one, the newest too.
    op.add_column("jobs", sa.Column("failures", sa.Integer(), nullable=False, server_default="0"))
    op.execute("UPDATE jobs SET failures = attempt - 1 WHERE attempt > 0")
    op.execute("UPDATE jobs SET failures = attempt WHERE state = 'queued'")
    op.add_column("jobs", sa.Column("pause_requested_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("paused_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    for column in ("paused_at", "pause_requested_at", "failures"):
        op.drop_column("jobs", column)
