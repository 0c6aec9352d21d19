"""Verdicts by content: the same judge is not asked twice about the same answers to the same prompt."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from dpo_service.online.judges.port import NO_USAGE, Judge, JudgeRequest, Verdict

_VERDICT = TypeAdapter(Verdict)
_WAIT_SECONDS = 10.0


class VerdictFile:
    """A SQLite file of verdicts by key. Several processes of one machine can share it.

    It is a cache and nothing more: a file that is damaged costs verdicts asked again, never the job.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._connection = _opened(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, or no place to write: not the file's fault
                raise
            path.unlink()
            self._connection = _opened(path)

    def get(self, key: str) -> Verdict | None:
        with self._lock, contextlib.suppress(sqlite3.Error, ValidationError):
            row = self._connection.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone()
            return _VERDICT.validate_json(row[0]) if row else None
        return None

    def put(self, key: str, verdict: Verdict) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            text = _VERDICT.dump_json(verdict).decode()
            self._connection.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, text))

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def _opened(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous=OFF")  # what a crash loses is asked again
    connection.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT NOT NULL)")
    return connection


class Cached:
    """`judge`, asked only what `file` does not hold. Kept are verdicts in which nothing failed; a tie is kept."""

    def __init__(self, judge: Judge, file: VerdictFile) -> None:
        self._judge = judge
        self._file = file
        self.name = judge.name
        self.digest = judge.digest

    async def judge(self, request: JudgeRequest) -> Verdict:
        started = time.monotonic()
        key = key_of(self.digest, request)
        kept = await asyncio.to_thread(self._file.get, key)
        if kept is not None:
            return replace(kept, cached=True, usage=NO_USAGE, seconds=time.monotonic() - started)
        verdict = await self._judge.judge(request)
        if verdict.complete:
            await asyncio.to_thread(self._file.put, key, verdict)
        return verdict

    async def close(self) -> None:
        await self._judge.close()
        self._file.close()


def key_of(judge: str, request: JudgeRequest) -> str:
    """sha256 of the judge's digest and of what it is shown: prompt, answers, reference answer. The row's other columns
    are for rules, which are not cached."""
    prompt = request.prompt if isinstance(request.prompt, str) else [dict(message) for message in request.prompt]
    answers = [[answer.text, answer.finished] for answer in request.answers]
    content = [judge, prompt, answers, request.reference]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
