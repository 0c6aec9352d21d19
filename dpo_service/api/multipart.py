"""A multipart body with one file, streamed to disk: nothing of it is ever whole in memory, or lies in /tmp.

request.stream() ── chunk ──> parser ──┬── part "file" ──> target, counted and hashed
                                       └── other parts ──> fields, each at most MAX_FIELD bytes
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path
from typing import IO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from dpo_service.errors import TooLarge, UserError
from dpo_service.storage.store import Store

MAX_FIELD = 64 << 10
MAX_PARTS = 32
CHECK_ROOM_EVERY = 32 << 20
FRAMING = 64 << 10
"""What headers and boundaries may add to the file's own bytes."""


class Received:
    """What came: the file's name, type, size and digest, and the form's other fields."""

    def __init__(self) -> None:
        self.filename: str | None = None
        self.content_type = "application/octet-stream"
        self.bytes = 0
        self.sha256 = ""
        self.fields: dict[str, str] = {}


async def receive_file(request: Request, target: Path, *, store: Store, limit: int, part: str = "file") -> Received:
    """Write the file in part `part` to `target` and return the rest of the form.

    Raises:
        UserError: not multipart, malformed, or without the part.
        TooLarge: over `limit` bytes.
        StorageFull: no room (checked ahead by Content-Length, and on the way).
        ClientDisconnect: the client went away. The caller removes `target` then, as after any error.
    """
    boundary = _boundary(request)
    declared = int(request.headers.get("content-length") or 0)
    if declared > limit + FRAMING:
        raise TooLarge(f"the file is larger than the limit of {limit:,} bytes (DPO_MAX_UPLOAD_BYTES)")
    store.require_room(declared)
    with target.open("wb") as file:
        form = _Form(boundary, file, part, limit)
        since_check = 0
        async for chunk in request.stream():
            since_check += len(chunk)
            if since_check > CHECK_ROOM_EVERY:
                since_check = 0
                store.require_room(CHECK_ROOM_EVERY)
                await asyncio.sleep(0)
            form.write(chunk)
        received = form.finish()
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    return received


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise UserError("the body must be multipart/form-data with the parts `file` and `purpose`", param="file")
    return boundary


class _Form:
    """The parser's callbacks. It calls them in order, with slices of the chunk it was given."""

    def __init__(self, boundary: bytes, file: IO[bytes], part: str, limit: int) -> None:
        self._file, self._part, self._limit = file, part, limit
        self._received = Received()
        self._hash = hashlib.sha256()
        self._parts = 0
        self._name: str | None = None
        self._field = bytearray()
        self._header_name, self._header_value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise UserError(f"the multipart body is malformed: {error}", param="file") from None

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise UserError(f"the multipart body is malformed: {error}", param="file") from None

    def finish(self) -> Received:
        if not self._ended:
            raise UserError("the multipart body ends before its closing boundary; send it again", param="file")
        if self._received.filename is None:
            raise UserError(f"`{self._part}` is missing: the multipart body has no part of that name", param=self._part)
        self._received.sha256 = self._hash.hexdigest()
        return self._received

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise UserError(f"the multipart body has more than {MAX_PARTS} parts")
        self._headers.clear()
        self._field.clear()

    def _on_header_end(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name != self._part:
            return
        if self._received.filename is not None:
            raise UserError(f"`{self._part}` is there twice; upload one file a request", param=self._part)
        self._received.filename = options.get(b"filename", b"").decode(errors="replace")
        kind = self._headers.get(b"content-type", b"application/octet-stream")
        self._received.content_type = kind.decode(errors="replace")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._name == self._part:
            self._received.bytes += len(piece)
            if self._received.bytes > self._limit:
                raise TooLarge(f"the file is larger than the limit of {self._limit:,} bytes; send less")
            self._hash.update(piece)
            self._file.write(piece)
            return
        self._field += piece
        if len(self._field) > MAX_FIELD:
            raise UserError(f"`{self._name}` is longer than {MAX_FIELD:,} bytes", param=self._name)

    def _on_part_end(self) -> None:
        if self._name is not None and self._name != self._part:
            self._received.fields[self._name] = self._field.decode(errors="replace")

    def _on_end(self) -> None:
        self._ended = True
