"""What a job sampled, on the wire: a prompt, its answers, what was said of them and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import orjson

from dpo_service.api.schemas.common import Wire
from dpo_service.jobs.samples import Page, place_of


class SampledAnswer(Wire):
    text: str
    finished: bool
    """False = cut off by the limit of tokens."""
    logp: float
    """Of the whole answer, under the policy that sampled it."""
    version: int
    """That policy: how many steps it had made."""
    score: float | None
    """None = there is none, and `missing` says why."""
    missing: str | None


class Comparison(Wire):
    """Two answers by their places, and which one was chosen: `first`, `second` or `tie`, in either order."""

    first: int
    second: int
    first_shown_first: str | None
    second_shown_first: str | None
    missing: str | None


class SampledPair(Wire):
    """Places among the answers; -1 = the file's own answer."""

    chosen: int
    rejected: int


class SampleObject(Wire):
    id: str
    object: Literal["fine_tuning.job.sample"] = "fine_tuning.job.sample"
    step: int
    """The training step it was made for, from 1, as in metrics."""
    position: int
    """Of the prompt, in the order of sampling."""
    prompt_index: int
    """Its row in the prepared dataset."""
    prompt: str | list[dict[str, Any]]
    answers: list[SampledAnswer]
    judge: str | None
    cached: bool
    """The verdict was remembered."""
    comparisons: list[Comparison]
    replies: list[str]
    """What the judge said, word for word."""
    pairs: list[SampledPair]
    dropped: str | None
    """Why there is no pair."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> SampleObject:
        pairs = zip(row["chosen"] or (), row["rejected"] or (), strict=True)
        return cls(
            id=place_of(dict(row)),
            step=row["step"],
            position=row["position"],
            prompt_index=row["prompt_index"],
            prompt=orjson.loads(row["prompt_text"]),
            answers=_answers(row),
            judge=row["judge"],
            cached=bool(row["cached"]),
            comparisons=[Comparison(**one) for one in row["comparisons"] or ()],
            replies=row["replies"] or [],
            pairs=[SampledPair(chosen=chosen, rejected=rejected) for chosen, rejected in pairs],
            dropped=row["dropped"],
        )


def _answers(row: Mapping[str, Any]) -> list[SampledAnswer]:
    texts = row["answer_texts"]
    none = [None] * len(texts)
    columns = texts, row["finished"], row["logps"], row["versions"], row["scores"] or none, row["missing"] or none
    return [
        SampledAnswer(text=text, finished=finished, logp=logp, version=version, score=score, missing=missing)
        for text, finished, logp, version, score, missing in zip(*columns, strict=True)
    ]


class SampleList(Wire):
    object: Literal["list"] = "list"
    data: list[SampleObject]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None

    @classmethod
    def of(cls, page: Page) -> SampleList:
        data = [SampleObject.of(row) for row in page.rows]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, has_more=page.has_more, first_id=first, last_id=last)
