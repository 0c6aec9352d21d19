"""The judge made of rules: each answer's score is the weighted mean of what its verifiers say."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass

from dpo_service.errors import JudgeCallFailed, JudgeError
from dpo_service.online.judges.digests import digest_of
from dpo_service.online.judges.port import ABSTAINED, Answer, JudgeRequest, Verdict
from dpo_service.online.judges.verifiers.port import Verifier
from dpo_service.online.judges.verifiers.registered import verifier_of
from dpo_service.specs.judge import RulesJudgeSpec
from dpo_service.specs.verifiers import Registered


@dataclass(frozen=True)
class _Weighed:
    verifier: Verifier
    weight: float
    seconds: float | None
    """How long it may take over an answer; None = it is one of ours, and bounded by itself."""


class RulesJudge:
    """A rule that has nothing to say of an answer, or fails on it, leaves the answer without a score.

    Ours run where they are called: they take microseconds. A package's verifier runs on a thread, so that one that
    waits holds up nobody, and one that hangs costs the verdict.
    """

    name = "rules"

    def __init__(self, spec: RulesJudgeSpec) -> None:
        self._rules = [
            _Weighed(verifier_of(rule), rule.weight, rule.timeout_seconds if isinstance(rule, Registered) else None)
            for rule in spec.rules
        ]
        self._total = sum(rule.weight for rule in self._rules)
        self.digest = digest_of(spec)

    async def judge(self, request: JudgeRequest) -> Verdict:
        started = time.monotonic()
        found = await asyncio.gather(*(self._answer(answer, request) for answer in request.answers))
        return Verdict(
            judge=self.name,
            scores=tuple(score for score, _ in found),
            missing=tuple(why for _, why in found),
            seconds=time.monotonic() - started,
        )

    async def _answer(self, answer: Answer, request: JudgeRequest) -> tuple[float | None, str | None]:
        total = 0.0
        for rule in self._rules:
            try:
                score = await _said(rule, answer, request)
            except JudgeCallFailed as error:
                return None, error.reason
            if score is None:
                return None, ABSTAINED
            total += rule.weight * score
        return total / self._total, None

    async def close(self) -> None:
        """Nothing is held."""


async def _said(rule: _Weighed, answer: Answer, request: JudgeRequest) -> float | None:
    if rule.seconds is None:
        return rule.verifier(answer, request)
    try:
        async with asyncio.timeout(rule.seconds):
            score = await asyncio.to_thread(rule.verifier, answer, request)
    except TimeoutError:
        raise JudgeCallFailed("a verifier took too long", reason="timeout", passing=False) from None
    except JudgeError:
        raise
    except Exception as error:
        raise JudgeCallFailed(f"a verifier failed: {error!r}", reason="verifier_failed", passing=False) from error
    if score is not None and not (math.isfinite(score) and 0 <= score <= 1):
        raise JudgeCallFailed(f"a verifier gave {score}, not 0 to 1", reason="not_a_score", passing=False)
    return score
