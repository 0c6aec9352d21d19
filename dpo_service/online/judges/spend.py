"""What a judge's calls cost, and the end of it."""

from __future__ import annotations

from dataclasses import replace

from dpo_service.errors import JudgeError, SpendCapReached
from dpo_service.online.judges.chat import ChatRequest, Complete, Completion
from dpo_service.online.judges.port import Usage
from dpo_service.specs.judge import PriceSpec

_PER = 1_000_000


class Purse:
    """Counts what is spent, and says when it is enough. One for the whole job, so `spent` goes into its checkpoints.

    A call is let through while less than the cap is spent; those under way at that moment are still paid for. A call
    that timed out may have cost something too: no endpoint says what.
    """

    def __init__(self, price: PriceSpec | None, cap: float | None, spent: float = 0.0) -> None:
        self._price = price
        self._cap = cap
        self.spent = spent

    def check(self) -> None:
        """
        Raises:
            SpendCapReached: the cap is spent.
        """
        if self._cap is not None and self.spent >= self._cap:
            raise SpendCapReached(
                f"the judge has cost {self.spent:.4f} and may cost {self._cap:g}; raise judge.endpoint.spend_cap and "
                "resume the job, or judge less",
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


class Paid:
    """`complete`, paid for."""

    def __init__(self, complete: Complete, purse: Purse) -> None:
        self._complete = complete
        self._purse = purse

    async def __call__(self, request: ChatRequest) -> Completion:
        self._purse.check()
        completion = await self._complete(request)
        return replace(completion, usage=self._purse.pay(completion.usage))
