"""Models by hub id: a local copy, fetched if need be. Weights are safetensors; code and pickles are never fetched."""

from __future__ import annotations

from pathlib import Path

from dpo_service.errors import TrainingError
from dpo_service.specs.run import ModelSource
from dpo_service.storage.store import Store

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


def locate_model(store: Store, source: ModelSource) -> Path:
    """The local directory of a model, fetched from the hub if need be.

    Raises:
        TrainingError: the hub does not deliver it.
    """
    if source.path is not None:
        return Path(source.path)
    if source.key is not None:
        return store.path(source.key)
    assert source.hub is not None
    return fetch_model(source.hub)
