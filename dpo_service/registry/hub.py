"""The model hub, as far as the control plane needs it: configuration and tokenizer, never weights."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from dpo_service.errors import ModelNotFound

DESCRIPTION = ("config.json", "tokenizer*", "chat_template*", "special_tokens_map.json", "vocab.json", "merges.txt")
TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0


def offline() -> bool:
    """Whether the environment forbids the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


async def fetch_description(name: str) -> Path:
    """The directory with the configuration and tokenizer of hub model `name`.

    Raises:
        ModelNotFound: the hub does not have it, does not give it, or cannot be reached.
    """
    try:
        return await asyncio.wait_for(asyncio.to_thread(_download, name), TIMEOUT_S)
    except TimeoutError:
        raise _unreachable(name, f"no answer in {TIMEOUT_S:.0f} s") from None


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        # model_info asks once; the listing calls of the hub library try six times over half a minute.
        info = HfApi().model_info(name, timeout=CONNECT_TIMEOUT_S)
        if any(file.rfilename.endswith(".safetensors") for file in info.siblings or ()):
            return Path(snapshot_download(name, allow_patterns=list(DESCRIPTION), etag_timeout=CONNECT_TIMEOUT_S))
    except GatedRepoError:
        raise ModelNotFound(
            f"hub model {name!r} is gated: accept its terms on the hub and set HF_TOKEN for the service", param="model"
        ) from None
    except RepositoryNotFoundError:
        raise ModelNotFound(f"neither this service nor the hub has a model {name!r}", param="model") from None
    except Exception as error:  # transport errors come in the types of whichever HTTP library the hub's client uses
        raise _unreachable(name, type(error).__name__) from error
    raise ModelNotFound(f"hub model {name!r} has no safetensors weights; choose one that has", param="model")


def _unreachable(name: str, why: str) -> ModelNotFound:
    return ModelNotFound(
        f"there is no model {name!r} here, and the hub cannot be reached ({why}); "
        "put its directory under <data-dir>/models, or name one by path",
        param="model",
    )
