"""What a running job says: events, metrics, checkpoints. Written to storage first, sent over HTTP second.

    stage ── Reporter ──> spool (append-only JSON lines in storage)          the truth
                 └──────> POST /internal/attempts/{submission_id}/reports    the fast path, best effort

The API ingests either and counts every report once: a report carries a `key`, unique in its job. While the API is away
the sender keeps its place in the spool and goes on from there; what never arrived is read from the spool when the
attempt has ended. So a job needs neither the API nor the database to run, and its history is complete all the same.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import orjson
from pydantic import TypeAdapter

from dpo_service.ids import random_suffix
from dpo_service.specs.base import Spec

SEND_EVERY_S = 0.5
RETRY_EVERY_S = 3.0
BATCH = 200


Kind = Literal["message", "metrics", "checkpoint", "dataset", "reference", "progress"]


class Report(Spec):
    """One thing a job said. `key` makes it idempotent: a second report with the same key changes nothing."""

    key: str
    created_at: float
    type: Kind
    level: Literal["info", "warn", "error"] = "info"
    message: str
    data: dict[str, Any] | None = None


REPORTS = TypeAdapter(list[Report])


class Reporter:
    """Writes reports of one source (a process of an attempt) and sends them on from a thread of its own.

    `directory` is the attempt's spool directory, `url` where the API takes this attempt's reports. Each Reporter writes
    a spool of its own, so a restarted process never appends to, or repeats the keys of, the one before it.
    """

    def __init__(self, directory: Path, process: str, *, url: str | None, token: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # What a process of this name said before it was killed, and may not have sent: it comes first.
        self._inherited = [path for path in spool_files(directory) if path.name.startswith(f"{process}-")]
        self._source = source = f"{process}-{random_suffix(8)}"
        self._path = directory / f"{source}.jsonl"
        self._file = self._path.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._sequence = 0
        self._stop = threading.Event()
        self._url, self._token = url, token
        self._sender = threading.Thread(target=self._send_loop, name="reports", daemon=True)
        if url:
            self._sender.start()

    def message(
        self, text: str, *, level: Literal["info", "warn", "error"] = "info", key: str | None = None, **data: Any
    ) -> None:
        """`key`: what is said again under it, by a run that resumed, counts once."""
        self._write("message", text, key=key, level=level, data=data or None)

    def metrics(self, split: str, step: int, values: Mapping[str, float], text: str) -> None:
        """`values` by name for `step` of `split` (train | eval). A step trained again keeps its first report."""
        self._write("metrics", text, key=f"metrics:{split}:{step}", data={"step": step, "split": split, **values})

    def checkpoint(
        self, step: int, storage_key: str, digest: str, metrics: Mapping[str, float], pruned: Sequence[int]
    ) -> None:
        """`pruned`: steps whose checkpoints were deleted to make room for this one."""
        data = {"step": step, "key": storage_key, "digest": digest, "metrics": dict(metrics), "pruned": list(pruned)}
        self._write("checkpoint", f"Checkpoint of step {step} saved", key=f"checkpoint:{step}", data=data)

    def dataset(self, manifest: Mapping[str, Any], text: str) -> None:
        self._write("dataset", text, key="dataset", data=dict(manifest))

    def reference(self, step: int, digest: str) -> None:
        """Which weights the loss measures against from `step` on; the job's record keeps the newest digest."""
        since = f"from step {step} on " if step else ""
        text = f"The reference policy {since}has digest {digest[:12]}"
        self._write("reference", text, key=f"reference:{step}", data={"step": step, "digest": digest})

    def progress(self, stage: str, done: int, total: int, text: str) -> None:
        """Where a stage stands. Not an event: the API keeps the latest only."""
        self._write("progress", text, data={"stage": stage, "done": done, "total": total})

    def _write(
        self,
        kind: Kind,
        text: str,
        *,
        key: str | None = None,
        level: Literal["info", "warn", "error"] = "info",
        data: dict[str, Any] | None = None,
    ) -> None:
        with self._lock:
            self._sequence += 1
            report = Report(
                key=key or f"{self._source}:{self._sequence}",
                created_at=time.time(),
                type=kind,
                level=level,
                message=text,
                data=data,
            )
            self._file.write(orjson.dumps(report.model_dump(), option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")

    def close(self, timeout: float = 5.0) -> None:
        """Send what is left, waiting at most `timeout` seconds; the spool keeps the rest."""
        self._stop.set()
        if self._sender.is_alive():
            self._sender.join(timeout)
        self._file.close()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_loop(self) -> None:
        offset = 0
        headers = {"authorization": f"Bearer {self._token}", "content-type": "application/json"}
        with httpx.Client(timeout=10, headers=headers, trust_env=False) as client:
            while True:
                stopping = self._stop.is_set()
                with contextlib.suppress(httpx.HTTPError):
                    while self._inherited:
                        self._send_from(client, self._inherited[0], 0)
                        self._inherited.pop(0)
                    offset = self._send_from(client, self._path, offset)
                if stopping:
                    return
                behind = self._path.stat().st_size > offset
                self._stop.wait(RETRY_EVERY_S if behind else SEND_EVERY_S)

    def _send_from(self, client: httpx.Client, path: Path, offset: int) -> int:
        """Send the spool `path` from `offset` on; returns the offset up to which the API has it."""
        for batch, end in read_spool(path, offset):
            response = client.post(str(self._url), content=orjson.dumps([r.model_dump() for r in batch]))
            response.raise_for_status()
            offset = end
        return offset


def read_spool(path: Path, offset: int = 0) -> Iterator[tuple[list[Report], int]]:
    """Batches of whole reports from byte `offset` on, each with the offset after it. A torn last line is left alone."""
    with path.open("rb") as file:
        file.seek(offset)
        batch: list[Report] = []
        for line in file:
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            batch.append(Report.model_validate(orjson.loads(line)))
            if len(batch) == BATCH:
                yield batch, offset
                batch = []
        if batch:
            yield batch, offset


def spool_files(directory: Path) -> list[Path]:
    """The spools of an attempt, oldest first."""
    return sorted(directory.glob("*.jsonl"), key=os.path.getmtime) if directory.is_dir() else []
