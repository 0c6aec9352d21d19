"""Which weights a job's loss measures against"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("reference_digest", sa.String(length=64), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "reference_digest")
