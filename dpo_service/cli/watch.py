"""Following a job: events by server-sent events, by polling where the stream breaks; drawn live, or as plain lines.

GET events?stream=true ──> Progress (what is known of the run) ──> draw()     bar, numbers, spark lines, warnings
      │                        ^                               └─> lines      when not a terminal
      └─ broken: wait for the service, take up after the last event
GET the job, every 2 s ───────┘    status, stage, total steps
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Event, Thread

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpo_service.cli.client import TERMINAL, Json, Service, job_path
from dpo_service.cli.exits import CliError, ExitCode, Refused
from dpo_service.cli.output import duration, err, job_status, print_json, status, table

POLL_S = 1.0
LOOK_S = 2.0
LINE_EVERY_S = 5.0
RESTART_S = 120.0
SPARKS = "▁▂▃▄▅▆▇█"
SHOWN = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "accuracy",
    "mean_token_accuracy": "token accuracy",
    "pairs_per_second": "pairs/s",
    "answers_per_second": "answers/s",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "peak_memory_gib": "peak GiB",
    "logps/displaced_share": "displaced",
    "length/margin_correlation": "length correlation",
    "online/reward": "reward",
    "valid/reward": "reward",
    "valid/kl": "KL",
    "valid/finished_share": "finished",
}
SPARKED = ("loss", "rewards/margins", "rewards/accuracies", "mean_token_accuracy", "online/reward")
EVAL_SHOWN = (*SPARKED, "valid/reward", "valid/kl", "valid/finished_share")


@dataclass
class Progress:
    """What is known of a run."""

    job_id: str
    status: str = "queued"
    stage: str = ""
    step: int = 0
    total: int = 0
    finish: float | None = None
    """When it will have ended at this pace, in seconds since the epoch."""
    metrics: dict[str, float] = field(default_factory=dict)
    evals: dict[int, dict[str, float]] = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=dict)
    """Every training metric, from the first line on."""
    warnings: dict[str, str] = field(default_factory=dict)
    """Those that hold, by what they are of."""
    message: str = ""

    def see(self, job: Json) -> None:
        """Learn from the job itself."""
        self.status, self.finish = job_status(job), job.get("estimated_finish")
        self.total = int((job.get("dataset") or {}).get("total_steps") or self.total)
        running = job.get("progress") or {}
        if running and running.get("stage") != "train":
            self.stage = f"{running['stage']}: {running['done']}/{running['total']}"
        elif running:
            self.stage, self.total = "", int(running["total"])

    def take(self, event: Json) -> None:
        """Learn from one event of the job."""
        data = event.get("data") or {}
        if event.get("type") != "metrics":
            self._hear(str(event.get("message", "")), event.get("level"), data.get("alarm"))
            return
        values = {name: float(value) for name, value in data.items() if isinstance(value, int | float)}
        step = int(values.get("step", 0))
        if data.get("split") == "eval":
            self.evals[step] = values
            return
        self.step, self.metrics = step, values
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)

    def _hear(self, message: str, level: object, alarm: object) -> None:
        self.message = message
        if level in ("warn", "error"):
            self.warnings[str(alarm or message)] = message
        elif alarm:
            self.warnings.pop(str(alarm), None)

    @property
    def seconds_left(self) -> float | None:
        return None if self.finish is None or self.status in TERMINAL else max(0.0, self.finish - time.time())


def spark_line(values: list[float], width: int = 40) -> str:
    """`values` as one line of blocks, averaged down to `width` columns."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(SPARKS[round((value - low) / span * (len(SPARKS) - 1))] for value in means)


def draw(progress: Progress, started: float) -> RenderableType:
    """The live picture of a run."""
    left = progress.seconds_left
    times = f"{duration(time.monotonic() - started)} gone" + (f", {duration(left)} left" if left is not None else "")
    lines: list[RenderableType] = [Text.from_markup(f"{progress.job_id}  {status(progress.status)}  {times}")]
    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(total=progress.total or 1, completed=progress.step, width=40), _position(progress))
    lines.append(bar)
    if progress.metrics:
        lines.append(Text("   ".join(_numbers(progress.metrics, tuple(SHOWN)))))
        lines += [
            Text(f"{SHOWN[name]:14} {spark_line(progress.history[name])}", style="cyan")
            for name in SPARKED
            if name in progress.history
        ]
    for step, values in sorted(progress.evals.items())[-2:]:
        lines.append(Text(f"validation at step {step}: " + "   ".join(_numbers(values, EVAL_SHOWN)), style="dim"))
    lines += [Text(f"Warning: {text}", style="bold yellow") for text in progress.warnings.values()]
    lines.append(Text(progress.message, style="dim", overflow="ellipsis", no_wrap=True))
    return Group(*lines)


def _position(progress: Progress) -> str:
    where = f"step {progress.step}/{progress.total}" if progress.total else "not training yet"
    return f"{where}  {progress.stage}" if progress.stage and not progress.step else where


def _numbers(values: dict[str, float], names: tuple[str, ...]) -> list[str]:
    return [f"{SHOWN[name]} {values[name]:.4g}" for name in names if name in values]


def event_line(event: Json) -> str:
    """One event as one plain line."""
    stamp = time.strftime("%H:%M:%S", time.localtime(event.get("created_at") or time.time()))
    level = "" if event.get("level") in (None, "info") else f" {str(event['level']).upper()}:"
    data = event.get("data") or {}
    if event.get("type") != "metrics":
        return f"{stamp}{level} {event.get('message', '')}"
    evaluation = data.get("split") == "eval"
    where = f"{'validation at ' if evaluation else ''}step {data.get('step', '?')}"
    return f"{stamp}{level} {where}: {'  '.join(_numbers(data, EVAL_SHOWN if evaluation else tuple(SHOWN)))}"


def events(service: Service, job_id: str) -> Iterator[Json]:
    """Every event of the job, oldest first and each once, until it has ended. Outlives a restart of the service."""
    seen: set[str] = set()
    while True:
        try:
            # The state is asked before the events: whatever was said before the end is in what follows.
            ended = service.get(job_path(job_id))["status"] in TERMINAL
            for event in _batch(service, job_id, stream=not ended):
                if event["id"] not in seen:
                    seen.add(event["id"])
                    yield event
        except CliError as error:
            if error.code is not ExitCode.UNREACHABLE:
                raise
            service.wait_ready(RESTART_S)
            continue
        if ended:
            return
        time.sleep(POLL_S)


def _batch(service: Service, job_id: str, *, stream: bool) -> Iterator[Json]:
    """The events so far and, where the service streams, those to come."""
    path = f"{job_path(job_id)}/events"
    if stream:
        try:
            yield from service.stream("GET", path, stream="true")
            return
        except Refused as error:
            if error.status == 404:
                raise
    yield from reversed(list(service.pages(path, limit=100)))


def follow(service: Service, job_id: str, *, as_json: bool = False) -> tuple[Json, Progress]:
    """Show the job until it has ended; returns it as it then is, and what was learnt on the way."""
    progress = Progress(job_id)
    progress.see(service.get(job_path(job_id)))
    if as_json:
        for event in events(service, job_id):
            progress.take(event)
            print_json(event)
    elif err.is_terminal:
        _follow_live(service, job_id, progress)
    else:
        _follow_lines(service, job_id, progress)
    job = service.get(job_path(job_id))
    progress.see(job)
    return job, progress


def _follow_live(service: Service, job_id: str, progress: Progress) -> None:
    """The job itself is asked from a thread of its own: between events it may say how far it has come."""
    done, started = Event(), time.monotonic()
    looker = Thread(target=_look, args=(service, job_id, progress, done), daemon=True)
    picture = Live(console=err, refresh_per_second=4, get_renderable=lambda: draw(progress, started))
    looker.start()
    try:
        with picture:
            for event in events(service, job_id):
                progress.take(event)
            progress.see(service.get(job_path(job_id)))
    finally:
        done.set()
        looker.join(timeout=5)


def _look(service: Service, job_id: str, progress: Progress, done: Event) -> None:
    while not done.wait(LOOK_S):
        try:
            progress.see(service.get(job_path(job_id)))
        except CliError:
            # The events' own loop says so when the service stays away.
            continue


def _follow_lines(service: Service, job_id: str, progress: Progress) -> None:
    """Messages and evaluations as they come, training metrics every few seconds."""
    printed = 0.0
    for event in events(service, job_id):
        progress.take(event)
        training = event.get("type") == "metrics" and (event.get("data") or {}).get("split") != "eval"
        if training and time.monotonic() - printed < LINE_EVERY_S:
            continue
        printed = time.monotonic() if training else printed
        warns = event.get("level") not in (None, "info")
        err.print(escape(event_line(event)), soft_wrap=True, style="bold yellow" if warns else None)


def summary(history: dict[str, list[float]]) -> Table:
    """Every metric's way: its first and newest value, the smallest and the largest, and a spark line."""
    rows = [
        (name, *(f"{value:.4g}" for value in (values[0], values[-1], min(values), max(values))), spark_line(values))
        for name, values in history.items()
        if name != "step"
    ]
    return table(("metric", "first", "newest", "least", "most", "over the steps"), rows)


def require_success(job: Json) -> None:
    """Raises CliError unless the job succeeded."""
    if job["status"] == "succeeded":
        return
    reason = (job.get("error") or {}).get("message") or f"it was {job['status']}"
    raise CliError(f"job {job['id']} did not succeed: {reason}", ExitCode.FAILED)
