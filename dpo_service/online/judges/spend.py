"""What a judge's calls cost, and the end of it.

    check ──> the call ──> pay ──> keep ──> the reply is used        over the cap: SpendCapReached

What a job's judge has cost lies in a file of the job, written before a reply is used. So the cap is the job's: an
attempt that follows a killed one, a pause or a retry goes on from what was spent, and not from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, replace

from dpo_service.errors import JudgeError, SpendCapReached
from dpo_service.online.judges.chat import ChatRequest, Complete, Completion
from dpo_service.online.judges.port import Usage
from dpo_service.specs.judge import PriceSpec
from dpo_service.storage.store import Store

_PER = 1_000_000


@dataclass(frozen=True)
class SpentFile:
    """A sum of money under a key of the storage, replaced whole and durably."""

    store: Store
    key: str

    def read(self) -> float:
        """
        Raises:
            JudgeError: the file was damaged; nobody knows what was spent.
        """
        if not self.store.exists(self.key):
            return 0.0
        try:
            return float(json.loads(self.store.read(self.key))["spent"])
        except (ValueError, KeyError, TypeError):
            raise JudgeError(
                f"{self.store.path(self.key)} does not say what the judge has cost so far; write it there as "
                '{"spent": 1.5}, or remove the file to begin from nothing'
            ) from None

    def write(self, spent: float) -> None:
        self.store.write(self.key, json.dumps({"spent": spent}).encode())


class Purse:
    """Counts what is spent, and says when it is enough.

    A call is let through while less than the cap is spent; those under way at that moment are still paid for. A call
    that timed out, or whose reply nobody waited for any more, may have cost something too: no endpoint says what.
    """

    def __init__(self, price: PriceSpec | None, cap: float | None, file: SpentFile | None = None) -> None:
        """`file` holds what was spent before, and is kept up to date; None = nothing was, and nothing is kept.

        Raises:
            JudgeError: as `SpentFile.read`.
        """
        self._price = price
        self._cap = cap
        self._file = file
        self._one_write = threading.Lock()
        self.spent = self._kept = file.read() if file is not None else 0.0

    def check(self) -> None:
        """
        Raises:
            SpendCapReached: the cap is spent.
        """
        if self._cap is not None and self.spent >= self._cap:
            raise SpendCapReached(
                f"the judge has cost {self.spent:.4f} and may cost {self._cap:g}; submit the job again with a higher "
                "judge.endpoint.spend_cap, or with fewer answers to judge (sampling.n, max_steps)",
                spent=self.spent,
                cap=self._cap,
            )

    def pay(self, usage: Usage) -> Usage:
        """`usage` with its cost.

        Raises:
            JudgeError: there is a cap, and the endpoint does not say what it used.
        """
        if self._cap is not None and usage.prompt_tokens + usage.completion_tokens == 0:
            raise JudgeError("the judge's endpoint does not report its use of tokens, so spend_cap cannot hold")
        if self._price is None:
            return usage
        cost = (usage.prompt_tokens * self._price.prompt + usage.completion_tokens * self._price.completion) / _PER
        self.spent += cost
        return replace(usage, cost=cost)

    async def keep(self) -> None:
        """Returns when the file says what is spent now. Of calls that end together one writes for all."""
        if self._file is not None and self._kept < self.spent:
            await asyncio.to_thread(self._keep, self._file)

    def _keep(self, file: SpentFile) -> None:
        with self._one_write:
            if self._kept < (spent := self.spent):
                file.write(spent)
                self._kept = spent


class Paid:
    """`complete`, paid for."""

    def __init__(self, complete: Complete, purse: Purse) -> None:
        self._complete = complete
        self._purse = purse

    async def __call__(self, request: ChatRequest) -> Completion:
        self._purse.check()
        completion = await self._complete(request)
        usage = self._purse.pay(completion.usage)
        await self._purse.keep()
        return replace(completion, usage=usage)
