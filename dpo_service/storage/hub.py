"""Models by hub id: a local copy, fetched if need be. Weights are safetensors; code and pickles are never fetched."""

from __future__ import annotations

from pathlib import Path

from dpo_service.errors import TrainingError

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def fetch_model(hub_id: str) -> Path:
    """The local directory of a model of the hub.

    Raises:
        TrainingError: the hub does not deliver it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=PATTERNS))
    except Exception as error:
        raise TrainingError(f"model {hub_id!r} could not be fetched from the hub: {error}", param="model") from error
