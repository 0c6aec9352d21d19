"""The digest of a judge: what its verdicts depend on beside the request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection

from dpo_service.specs.base import Spec


def digest_of(spec: Spec, *also: str, without: Collection[str] = ()) -> str:
    """sha256 of `spec` but for its fields `without`, and of the texts `also` (prompts, digests of weights)."""
    document = spec.model_dump(mode="json", exclude=set(without))
    return hashlib.sha256(json.dumps([document, *also], sort_keys=True).encode()).hexdigest()
