"""The digest of a judge: what its verdicts depend on beside the request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection

from dpo_service.specs.base import Spec
from dpo_service.specs.judge import PairwiseJudgeSpec, ScoringJudgeSpec

_HOW_IT_IS_ASKED = {"limits", "limit_name", "price", "spend_cap", "api_key_env"}


def digest_of(spec: Spec, *also: str, without: Collection[str] = ()) -> str:
    """sha256 of `spec` but for its fields `without`, and of the texts `also` (prompts, digests of weights)."""
    document = spec.model_dump(mode="json", exclude=set(without))
    return _sha256([document, *also])


def digest_of_asked(spec: PairwiseJudgeSpec | ScoringJudgeSpec, *prompts: str) -> str:
    """sha256 of what a language model is asked and which one; not of prices, limits and keys."""
    document = spec.model_dump(mode="json", exclude={"cache": True, "endpoint": _HOW_IT_IS_ASKED})
    return _sha256([document, *prompts])


def _sha256(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
