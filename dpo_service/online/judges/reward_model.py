"""The judge that is a reward model: a sequence-classification checkpoint with one output.

judge(request) ── the model's own template and tokens ──> Scorer ──> a score an answer
                                                            reward_inprocess   transformers, in this process
                                                            reward_actor       vLLM, in a process of its own
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from dpo_service.errors import InvalidData, JudgeCallFailed
from dpo_service.online.judges.digests import digest_of
from dpo_service.online.judges.port import Answer, JudgeRequest, Verdict
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.judge import RewardModelJudgeSpec

TOO_LONG = "too_long"
NOT_FINITE = "not_finite"
NO_TEMPLATE = "template_refused"

Ids = list[int]


class Scorer(Protocol):
    """What computes the scores of token sequences. Safe to ask from many tasks of one event loop at once."""

    async def scores(self, sequences: Sequence[Ids]) -> list[float]:
        """One score a sequence; NaN or infinite where the model says so.

        Raises:
            JudgeCallFailed: these could not be scored, as its engine was lost.
            JudgeError: nothing can be scored.
        """
        ...

    async def close(self) -> None: ...


class RewardModelJudge:
    name = "reward_model"

    def __init__(self, spec: RewardModelJudgeSpec, directory: Path, model_digest: str, scorer: Scorer) -> None:
        """`scorer` computes the model in `directory`, and is closed with the judge. `model_digest` names its weights:
        the cache goes by it, not by the model's name."""
        self._tokenizer = Tokenizer.load(directory)
        self._longest = longest(directory, spec)
        self._scorer = scorer
        self.digest = digest_of(spec, model_digest, without=("model", "batch_tokens", "cache", "cpus", "gpus"))

    async def judge(self, request: JudgeRequest) -> Verdict:
        started = time.monotonic()
        read = [self._ids(request, answer) for answer in request.answers]
        found = iter(await self._scored([ids for ids in read if not isinstance(ids, str)]))
        told = [(None, ids) if isinstance(ids, str) else next(found) for ids in read]
        return Verdict(
            judge=self.name,
            scores=tuple(score for score, _ in told),
            missing=tuple(why for _, why in told),
            seconds=time.monotonic() - started,
        )

    def _ids(self, request: JudgeRequest, answer: Answer) -> Ids | str:
        """Prompt and answer as the reward model's template writes them, in its tokens; or why there are none."""
        tokenizer = self._tokenizer
        try:
            if isinstance(request.prompt, str):
                ids = tokenizer.encode(request.prompt + answer.text)
            else:
                messages = [*map(dict, request.prompt), {"role": "assistant", "content": answer.text}]
                ids = tokenizer.encode(tokenizer.render(messages), add_special_tokens=False)
        except InvalidData:
            return NO_TEMPLATE
        return ids if 0 < len(ids) <= self._longest else TOO_LONG

    async def _scored(self, sequences: list[Ids]) -> list[tuple[float | None, str | None]]:
        """A score, or why there is none, a sequence."""
        if not sequences:
            return []
        try:
            return [_finite(score) for score in await self._scorer.scores(sequences)]
        except JudgeCallFailed as error:
            return [(None, error.reason)] * len(sequences)

    async def close(self) -> None:
        await self._scorer.close()


def _finite(score: float) -> tuple[float | None, str | None]:
    return (score, None) if math.isfinite(score) else (None, NOT_FINITE)


def longest(directory: Path, spec: RewardModelJudgeSpec) -> int:
    """Tokens of the longest sequence that is scored: as many as the job, the model and its tokenizer allow."""
    config = _read(directory / "config.json")
    text = config.get("text_config") or config
    places = text.get("max_position_embeddings") or text.get("n_positions")
    allowed = (places, _read(directory / "tokenizer_config.json").get("model_max_length"))
    return min([spec.max_length, *(int(length) for length in allowed if length)])


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return document
