"""Files by key under one root, shared by the control plane and the jobs.

A key is a relative path; one that leads outside the root is refused. Writes appear whole or not at all: bytes go to a
hidden neighbour and are renamed, directories likewise (`publish`).
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from dpo_service.errors import NotFound, StorageFull, UserError

M = TypeVar("M", bound=BaseModel)
RESERVE_BYTES = 64 << 20
"""Kept free, so that a database commit still fits when uploads have filled the disk."""


class Store:
    """The files under `root`, a directory every process of the service can reach."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).resolve()

    def path(self, key: str) -> Path:
        """The local path of `key`.

        Raises:
            UserError: the key leads outside the root.
        """
        if "\0" in key:
            raise UserError("a storage key holds a NUL character")
        path = (self.root / key).resolve()
        if not path.is_relative_to(self.root):
            raise UserError(f"storage key {key!r} leads outside the data directory")
        return path

    def key(self, path: Path) -> str:
        return str(path.resolve().relative_to(self.root))

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def read(self, key: str) -> bytes:
        try:
            return self.path(key).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"nothing is stored under {key!r}") from None

    def write(self, key: str, data: bytes) -> None:
        """Write atomically and durably."""
        with self.replacing(key) as temporary:
            temporary.write_bytes(data)

    def read_model(self, key: str, model: type[M]) -> M:
        return model.model_validate_json(self.read(key))

    def write_model(self, key: str, value: BaseModel) -> None:
        self.write(key, value.model_dump_json(indent=1).encode())

    @contextmanager
    def replacing(self, key: str) -> Iterator[Path]:
        """A temporary path beside `key`; on a clean exit it is synced and becomes `key`, else it is removed."""
        target = self.path(key)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull("the disk that holds the data directory is full; free some space") from error
            raise
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def publishing(self, key: str) -> Iterator[Path]:
        """A temporary directory; on a clean exit it is renamed to `key` (replacing what was there), else removed."""
        target = self.path(key)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir(parents=True)
        try:
            yield temporary
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def delete(self, key: str) -> None:
        """Remove a file or a directory; one that is not there is fine."""
        path = self.path(key)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def require_room(self, bytes_needed: int) -> None:
        """Raises StorageFull unless `bytes_needed` fit beside the reserve."""
        free = shutil.disk_usage(self.root).free
        if free - RESERVE_BYTES < bytes_needed:
            raise StorageFull(
                f"{bytes_needed:,} bytes do not fit: the disk of the data directory has {free:,} left "
                f"(and {RESERVE_BYTES:,} are kept in reserve); free some space or upload a smaller file"
            )
