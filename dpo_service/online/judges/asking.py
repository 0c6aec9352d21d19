"""One question to a language model: asked, read, and where the reply cannot be read, asked once more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from dpo_service.errors import JudgeCallFailed
from dpo_service.online.judges.chat import ChatRequest, Complete, Said
from dpo_service.online.judges.port import NO_USAGE, UNREADABLE, Answer, JudgeRequest, Usage, Verdict

T = TypeVar("T")


@dataclass(frozen=True)
class Asked(Generic[T]):
    """`value` is None where there is none, and `failure` then says why."""

    value: T | None
    failure: str | None = None
    replies: tuple[str, ...] = ()
    usage: Usage = NO_USAGE


async def ask(complete: Complete, request: ChatRequest, read: Callable[[str], T | None], repair: str) -> Asked[T]:
    """What `read` makes of the reply or, where it makes nothing of it, of a second one, asked for with `repair`."""
    replies: tuple[str, ...] = ()
    usage = NO_USAGE
    try:
        for _ in range(2):
            completion = await complete(request)
            replies, usage = (*replies, completion.text), usage + completion.usage
            value = read(completion.text)
            if value is not None:
                return Asked(value, None, replies, usage)
            again = (Said("assistant", completion.text), Said("user", repair))
            request = replace(request, messages=request.messages + again)
    except JudgeCallFailed as error:
        return Asked(None, error.reason, replies, usage)
    return Asked(None, UNREADABLE, replies, usage)


def most_answered(asked: Sequence[Asked[T]]) -> tuple[list[T], str | None]:
    """The values of several samples of one question; without over half of them, none, and why."""
    values = [one.value for one in asked if one.value is not None]
    if 2 * len(values) > len(asked):
        return values, None
    return [], next(one.failure for one in asked if one.failure)


def all_replies(asked: Sequence[Asked[T]]) -> tuple[str, ...]:
    return tuple(reply for one in asked for reply in one.replies)


def all_usage(asked: Sequence[Asked[T]]) -> Usage:
    return sum((one.usage for one in asked), NO_USAGE)


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results, in order. The first error cancels the rest and is raised as it is: nothing is asked in vain."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def sampled_scores(
    judge: str,
    request: JudgeRequest,
    score: Callable[[JudgeRequest, Answer, int], Coroutine[Any, Any, Asked[float]]],
    samples: int,
    middle: Callable[[Sequence[float]], float],
) -> Verdict:
    """Each answer's score: the `middle` of so many samples, where over half of them could be had. `score` is told which
    sample it is asked for."""
    started = time.monotonic()
    asked = await together(score(request, answer, one) for answer in request.answers for one in range(samples))
    found = [most_answered(asked[i : i + samples]) for i in range(0, len(asked), samples)]
    return Verdict(
        judge=judge,
        scores=tuple(middle(values) if values else None for values, _ in found),
        missing=tuple(why for _, why in found),
        replies=all_replies(asked),
        usage=all_usage(asked),
        seconds=time.monotonic() - started,
    )
