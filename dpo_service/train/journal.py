"""What a run says of itself while it trains: a window of steps becomes one line of metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from dpo_service.clock import monotonic
from dpo_service.manifests.checkpoint import EVALUATED_AT
from dpo_service.specs.run import RunSpec
from dpo_service.train import metrics
from dpo_service.train.step import StepResult


class Reports(Protocol):
    """The part of `reports.Reporter` a run uses."""

    def message(self, text: str) -> None: ...
    def metrics(self, split: str, step: int, values: dict[str, float], text: str) -> None: ...
    def checkpoint(
        self, step: int, storage_key: str, digest: str, metrics: dict[str, float], pruned: list[int]
    ) -> None: ...
    def reference(self, step: int, digest: str) -> None: ...
    def progress(self, stage: str, done: int, total: int, text: str) -> None: ...


class Journal:
    """Gathers the sums of steps until they are told. Every rank keeps one; only rank 0's has `reports`."""

    def __init__(
        self,
        run: RunSpec,
        reports: Reports | None,
        *,
        paired: bool,
        steps_per_epoch: int,
        total_steps: int,
        device: torch.device,
    ) -> None:
        self._run, self._reports, self._paired = run, reports, paired
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._device = device
        self._window = metrics.empty(paired, device)
        self._since = monotonic()
        self._told_tokens = 0
        """Trained on since the run began, those of the window left out."""
        self.latest: dict[str, float] = {}
        """The newest value of every metric; those of the validation split carry the prefix `eval_`."""

    def message(self, text: str) -> None:
        if self._reports is not None:
            self._reports.message(text)

    @property
    def tokens(self) -> int:
        """Trained on since the run began. Waits for the device."""
        return self._told_tokens + int(self._window["tokens"])

    def add(self, result: StepResult) -> None:
        self._window.merge(result.sums)

    def tell(self, step: int, result: StepResult) -> None:
        """The window up to `step`, and begin a new one."""
        sums, now = self._window.read(), monotonic()
        self._told_tokens += int(sums["tokens"])
        values = metrics.means(sums, self._run.loss.name) | {
            "grad_norm": float(result.grad_norm),
            "learning_rate": result.learning_rate,
            "num_tokens": float(self._told_tokens),
            "epoch": step / self._steps_per_epoch,
            **metrics.rates(sums, now - self._since),
        }
        self._window, self._since = metrics.empty(self._paired, self._device), now
        self.latest |= values
        if self._reports is not None:
            text = metrics.sentence(step, self._total_steps, "training", values)
            self._reports.metrics("train", step, values, text)
            self._reports.progress("train", step, self._total_steps, text)

    def tell_validation(self, step: int, sums: dict[str, float], seconds: float) -> None:
        values = metrics.means(sums, self._run.loss.name)
        self.latest |= {EVALUATED_AT: float(step)} | {f"eval_{name}": value for name, value in values.items()}
        if self._reports is not None:
            values |= metrics.rates(sums, seconds)
            text = metrics.sentence(step, self._total_steps, "validation", values)
            self._reports.metrics("eval", step, values, text)

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """What is done within does not count as time of the window's steps."""
        started = monotonic()
        yield
        self._since += monotonic() - started

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"num_tokens": self.tokens, "window": self._window.read()}

    def resume(self, counters: dict[str, Any], latest: dict[str, float]) -> None:
        self._window.add(counters["window"])
        self._told_tokens = int(counters["num_tokens"]) - int(counters["window"]["tokens"])
        self.latest = dict(latest)
