"""A job's plan on the wire."""

from __future__ import annotations

from typing import Any, Literal

from dpo_service.api.schemas.common import Wire
from dpo_service.api.schemas.jobs import shown_run
from dpo_service.jobs.plan import Planned
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.planning.plan import Plan


class PlanObject(Wire):
    object: Literal["fine_tuning.job.plan"] = "fine_tuning.job.plan"
    model: str
    plan: Plan
    """Memory of one device by part in bytes, times in seconds, whether it fits, and what would make it fit."""
    run: dict[str, Any]
    """Every number as it would be decided, where the request says "auto" or nothing."""
    dataset: DatasetReport

    @classmethod
    def of(cls, planned: Planned) -> PlanObject:
        return cls(model=planned.run.model.name, plan=planned.plan, run=shown_run(planned.run), dataset=planned.report)
