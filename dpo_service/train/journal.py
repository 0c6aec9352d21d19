"""What a run says of itself while it trains: a window of steps becomes one line of metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch

from dpo_service.clock import monotonic
from dpo_service.manifests.checkpoint import EVALUATED_AT
from dpo_service.specs.eval import HELD_OUT
from dpo_service.specs.run import RunSpec
from dpo_service.train import metrics
from dpo_service.train.alarms import SUMS, Alarms, Settings
from dpo_service.train.flops import matrix_rate
from dpo_service.train.optim import warmup_steps
from dpo_service.train.ranks import Ranks
from dpo_service.train.step import StepResult
from dpo_service.train.validation import Validation


class Reports(Protocol):
    """The part of `reports.Reporter` a run uses."""

    def message(
        self, text: str, *, level: Literal["info", "warn"] = "info", key: str | None = None, **data: Any
    ) -> None: ...
    def metrics(self, split: str, step: int, values: dict[str, float], text: str) -> None: ...
    def checkpoint(
        self, step: int, storage_key: str, digest: str, metrics: dict[str, float], pruned: list[int]
    ) -> None: ...
    def reference(self, step: int, digest: str) -> None: ...
    def progress(self, stage: str, done: int, total: int, text: str) -> None: ...


def settings_of(run: RunSpec, total_steps: int) -> Settings:
    """What the alarms ask for of `run`."""
    return Settings(
        warmup_steps(run.optim, total_steps),
        run.optim.max_grad_norm,
        lowers_chosen=run.loss.has("apo_down"),
        follows_policy=run.online is not None and run.online.sync == "step",
    )


class Journal:
    """Gathers the sums of steps until they are told. Every rank keeps one; only rank 0's has `reports`."""

    def __init__(
        self,
        run: RunSpec,
        reports: Reports | None,
        *,
        steps_per_epoch: int,
        total_steps: int,
        ranks: Ranks,
    ) -> None:
        self._run, self._reports = run, reports
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._ranks = ranks
        self._window = metrics.empty(run.trained_rows, ranks.device)
        dtype = torch.float32 if run.precision == "float32" else torch.bfloat16
        self.matrix_rate = sum(ranks.gather(matrix_rate(ranks.device, dtype)))
        """Operations a second of a large matrix product, all ranks together."""
        self._alarms = Alarms(settings_of(run, total_steps))
        self._since = monotonic()
        self._told_tokens = 0
        """Trained on since the run began, those of the window left out."""
        self.latest: dict[str, float] = {}
        """The newest value of every metric; those of the validation split carry the prefix `eval_`, of
        held-out prompts `valid/`."""

    def message(self, text: str, **data: Any) -> None:
        if self._reports is not None:
            self._reports.message(text, **data)

    @property
    def tokens(self) -> int:
        """Trained on since the run began. Waits for the device."""
        return self._told_tokens + int(self._window["tokens"])

    def add(self, result: StepResult) -> None:
        self._window.merge(result.sums)

    def tell(self, step: int, result: StepResult, more: Mapping[str, float]) -> None:
        """The window up to `step`, with `more` metrics, and begin a new one."""
        sums, now = self._window.read(), monotonic()
        self._told_tokens += int(sums["tokens"])
        values = metrics.means(sums, self._run.loss.name) | {
            "grad_norm": float(result.grad_norm),
            "learning_rate": result.learning_rate,
            "num_tokens": float(self._told_tokens),
            "epoch": step / self._steps_per_epoch,
            **metrics.rates(sums, now - self._since),
            **metrics.utilisation(sums, now - self._since, self.matrix_rate),
            "peak_memory_gib": max(self._ranks.gather(metrics.peak_memory_gib(self._ranks.device))),
            **more,
        }
        self._window, self._since = metrics.empty(self._run.trained_rows, self._ranks.device), now
        self.latest |= values
        if self._reports is not None:
            text = metrics.sentence(step, self._total_steps, "training", values)
            self._reports.metrics("train", step, values, text)
            self._reports.progress("train", step, self._total_steps, text)
        self._warn(step, sums, float(result.grad_norm))

    def _warn(self, step: int, sums: dict[str, float], grad_norm: float) -> None:
        """Every rank looks, because each may be the one that saves what was seen; rank 0 tells."""
        window = {name: sums[name] for name in SUMS if name in sums} | {"step": float(step), "grad_norm": grad_norm}
        for warned in self._alarms.see(window):
            if self._reports is not None:
                self._reports.message(
                    warned.text,
                    level="info" if warned.over else "warn",
                    key=f"alarm:{warned.name}:{step}",
                    alarm=warned.name,
                    step=step,
                )

    def tell_validation(self, step: int, found: Validation) -> None:
        """What this evaluation has not measured is not known any more."""
        kept = {name if name.startswith(HELD_OUT) else f"eval_{name}": value for name, value in found.values.items()}
        before = {name: value for name, value in self.latest.items() if not name.startswith((HELD_OUT, "eval_"))}
        self.latest = before | {EVALUATED_AT: float(step)} | kept
        if self._reports is not None:
            values = found.values | found.work
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
        return {
            "num_tokens": self.tokens,
            "window": self._window.read(),
            "window_seconds": monotonic() - self._since,
            "alarms": self._alarms.counters(),
        }

    def resume(self, counters: dict[str, Any], latest: dict[str, float]) -> None:
        self._window.add(counters["window"])
        self._told_tokens = int(counters["num_tokens"]) - int(counters["window"]["tokens"])
        self._since = monotonic() - float(counters["window_seconds"])
        self._alarms.resume(counters["alarms"])
        self.latest = dict(latest)
