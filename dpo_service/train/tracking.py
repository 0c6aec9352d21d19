"""Metrics to the trackers a job names, beside the job's own reports.

A tracker is a guest: what goes wrong with it is told once, as a warning, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dpo_service.reports import Reporter
from dpo_service.specs.job import Integration
from dpo_service.specs.run import RunSpec


class Tracked:
    """A `Reporter` whose metrics also go to Weights & Biases, one run there for each integration.

    The run there carries the job's id, so that another attempt goes on in it. The key comes from the environment
    (WANDB_API_KEY), never from the job.
    """

    def __init__(self, reporter: Reporter, run: RunSpec) -> None:
        self._reporter = reporter
        self._trackers = [t for t in (self._open(i, run) for i in run.integrations) if t is not None]
        self.message, self.progress = reporter.message, reporter.progress
        self.checkpoint, self.reference = reporter.checkpoint, reporter.reference

    def metrics(self, split: str, step: int, values: dict[str, float], text: str) -> None:
        self._reporter.metrics(split, step, values, text)
        named = {f"{split}/{name}": value for name, value in values.items()}
        for tracker in tuple(self._trackers):
            if self._attempt(lambda tracker=tracker: tracker.log(named, step=step)) is _FAILED:  # type: ignore[misc]
                self._trackers.remove(tracker)

    def close(self) -> None:
        for tracker in self._trackers:
            self._attempt(tracker.finish)
        self._reporter.close()

    def _open(self, integration: Integration, run: RunSpec) -> Any | None:
        opened = self._attempt(lambda: _wandb_run(integration, run))
        return None if opened is _FAILED else opened

    def _attempt(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            self._reporter.message(f"Weights & Biases: {error}; it gets no more of this run", level="warn")
            return _FAILED


_FAILED = object()


def _wandb_run(integration: Integration, run: RunSpec) -> Any:
    import wandb  # an extra, and slow to import

    asked = integration.wandb
    tags: Sequence[str] = asked.tags
    return wandb.init(
        project=asked.project,
        entity=asked.entity,
        name=asked.name or run.job_id,
        tags=list(tags),
        id=run.job_id,
        resume="allow",
        config=run.model_dump(mode="json", exclude={"integrations"}),
    )
