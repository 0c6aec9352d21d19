"""Which checkpoint answers: found out from the files that are served, and said in every answer.

A header on each response (`x-dpo-checkpoint`, `x-dpo-deployment`), and `system_fingerprint` in the JSON of OpenAI's
API: of a whole answer, and of the last chunk of a stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpo_service.checkpoint.format import digest_of
from dpo_service.errors import CheckpointError
from dpo_service.manifests.checkpoint import CheckpointManifest

CHECKPOINT_HEADER = "x-dpo-checkpoint"
DEPLOYMENT_HEADER = "x-dpo-deployment"


def identify(model_dir: Path, expected: str | None) -> str:
    """The digest of the model in `model_dir`, read from its bytes.

    A published model is known by its checkpoint's digest or by that of `model/` alone; either is answered as it was
    expected. Reads every file once.

    Raises:
        CheckpointError: the files are not the ones that were published as `expected`.
    """
    actual = digest_of(model_dir)
    if expected is None or expected in _names(model_dir, actual):
        return expected or actual
    raise CheckpointError(
        f"the model in {model_dir} is not the one that was published: its digest is {actual[:12]}, "
        f"expected {expected[:12]}; put the original files back, or publish it again"
    )


def _names(model_dir: Path, actual: str) -> set[str]:
    """Digests under which the model with digest `actual` may have been published."""
    manifest_file = model_dir.parent / "manifest.json"
    if not manifest_file.is_file():
        return {actual}
    manifest = CheckpointManifest.model_validate_json(manifest_file.read_bytes())
    return {actual, manifest.digest} if manifest.model_digest == actual else {actual}


class NamesItsCheckpoint:
    """ASGI middleware that adds `headers` to every response."""

    def __init__(self, app: ASGIApp, headers: Iterable[tuple[str, str]]) -> None:
        self._app = app
        self._headers = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._headers]
            await send(message)

        await self._app(scope, receive, send_named if scope["type"] == "http" else send)
