"""Held-out prompts, sampled and judged: what a policy is worth, without training on it.

    prompts ── a seed of their own each ──> Sampler ──> answers ──> judge ──> Evaluation
                                                                    of one that only compares: answer against the row's

Nothing in it needs a job: a sampler of any checkpoint and any judge will do. Seeds depend on nothing but `seed` and the
row, so two checkpoints are asked the same questions with the same dice.

A judge that scores gives the reward: the mean score of the answers that have one. A judge that compares is shown each
answer beside the row's own, and the reward is the share it wins of what was decided. What failed, tied or had nothing
to be compared with is no score: it is counted, by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dpo_service.errors import TrainingError
from dpo_service.online.judges.metrics import JudgeSums
from dpo_service.online.judges.port import ABSTAINED, TIED, Answer, Judge, JudgeRequest
from dpo_service.online.port import Sample, SamplePrompt, Sampler, seed_of
from dpo_service.online.prompts import PromptRow
from dpo_service.online.together import all_of
from dpo_service.specs.eval import HELD_OUT
from dpo_service.specs.sampling import SamplingSpec

NO_REFERENCE = "no_reference"
SEEDS = 2
"""Which of a row's seeds (`seed_of`): answers to train on have the first, a policy's replies as a judge the second."""


@dataclass(frozen=True)
class Evaluated:
    """One answer to a held-out prompt."""

    prompt: PromptRow
    sample: Sample
    text: str
    score: float | None
    """The judge's; against the row's own answer 1 = won, 0 = lost. None = there is none."""
    missing: str | None = None
    """Why not; None without a judge."""


@dataclass(frozen=True)
class Evaluation:
    """What the answers of one policy are like."""

    answers: tuple[Evaluated, ...]
    judge: JudgeSums = field(default_factory=JudgeSums)
    """What judging them took."""

    @property
    def reward(self) -> float | None:
        """Mean score of the answers that have one, in the judge's unit; None = none has."""
        return _mean([one.score for one in self.answers if one.score is not None])

    @property
    def finished(self) -> float | None:
        """Share of the answers that ended by themselves."""
        return _mean([float(one.sample.finished) for one in self.answers])

    @property
    def tokens(self) -> float | None:
        """Mean length of an answer."""
        return _mean([float(len(one.sample.token_ids)) for one in self.answers])

    @property
    def missing(self) -> Counter[str]:
        """Answers without a score, by reason."""
        return Counter(one.missing for one in self.answers if one.missing is not None)

    def report(self) -> dict[str, float]:
        """Metrics by name. What there was nothing of to measure is left out."""
        parts = {"reward": self.reward, "finished_share": self.finished, "answer_tokens": self.tokens}
        counts = {f"missing/{why}": float(count) for why, count in sorted(self.missing.items())}
        return {f"{HELD_OUT}{name}": value for name, value in (parts | counts).items() if value is not None}


@dataclass(frozen=True)
class Question:
    """How prompts are asked and judged: the same for every policy that is to be compared."""

    options: SamplingSpec
    """`n` answers to a prompt, each judged for itself."""
    seed: int
    decode: Callable[[Sequence[int]], str]
    """An answer's text, for the judge: without special tokens."""
    against_own: bool = False
    """The judge only compares: it is shown each answer beside the row's own."""
    chunk: int = 8
    """Prompts asked of the sampler in one call; each chunk is judged as soon as it is there."""


@dataclass(frozen=True)
class HeldOut:
    """A job's held-out prompts, and what is asked of a policy with them."""

    prompts: Sequence[PromptRow]
    judge: Judge | None
    question: Question

    async def evaluate(self, sampler: Sampler) -> Evaluation:
        """As the function of this name."""
        return await evaluate(sampler, self.judge, self.prompts, self.question)


async def evaluate(
    sampler: Sampler, judge: Judge | None, prompts: Sequence[PromptRow], question: Question
) -> Evaluation:
    """The answers of `sampler` to `prompts`, judged; without a judge they have no scores.

    Raises:
        JudgeError: no verdicts can be had at all.
        TrainingError: the sampler cannot sample these prompts, or was given other weights meanwhile.
    """
    sums = JudgeSums()
    chunks = [prompts[start : start + question.chunk] for start in range(0, len(prompts), question.chunk)]
    made = await all_of(_chunk(sampler, judge, chunk, question, sums) for chunk in chunks)
    answers = tuple(one for some in made for one in some)
    versions = {one.sample.version for one in answers}
    if len(versions) > 1:
        raise TrainingError(f"the samplers were given other weights while they were evaluated: {sorted(versions)}")
    return Evaluation(answers, sums)


async def _chunk(
    sampler: Sampler, judge: Judge | None, rows: Sequence[PromptRow], question: Question, sums: JudgeSums
) -> list[Evaluated]:
    asked = [SamplePrompt(row.token_ids, seed_of(question.seed, row.index, SEEDS)) for row in rows]
    sampled = await sampler.sample(asked, question.options)
    judged = await all_of(
        _judged(judge, row, samples, question, sums) for row, samples in zip(rows, sampled, strict=True)
    )
    return [one for some in judged for one in some]


async def _judged(
    judge: Judge | None, row: PromptRow, samples: Sequence[Sample], question: Question, sums: JudgeSums
) -> list[Evaluated]:
    answers = [Answer(question.decode(one.token_ids), one.token_ids, one.finished) for one in samples]
    if judge is None:
        scores: list[_Score] = [(None, None)] * len(answers)
    elif question.against_own:
        scores = await all_of(_against_own(judge, row, answer, question, sums) for answer in answers)
    else:
        scores = await _scores(judge, row, answers, sums)
    given = zip(samples, answers, scores, strict=True)
    return [Evaluated(row, sample, answer.text, score, why) for sample, answer, (score, why) in given]


_Score = tuple[float | None, str | None]
"""An answer's score, or why it has none."""


async def _scores(judge: Judge, row: PromptRow, answers: Sequence[Answer], sums: JudgeSums) -> list[_Score]:
    request = JudgeRequest(row.text, tuple(answers), row.token_ids, row.reference, row.row)
    verdict = await judge.judge(request)
    sums.note(verdict)
    missing = verdict.missing or (None,) * len(answers)
    told = zip(verdict.scores, missing, strict=True)
    return [(score, None) if score is not None else (None, why or ABSTAINED) for score, why in told]


async def _against_own(judge: Judge, row: PromptRow, answer: Answer, question: Question, sums: JudgeSums) -> _Score:
    """1 = better than the row's own answer, 0 = worse. Which of the two is shown first is drawn by row, because a
    ranking that is asked for once shows them in one order only."""
    if row.reference is None:
        return None, NO_REFERENCE
    place = seed_of(question.seed, row.index, SEEDS) % 2
    both = [Answer(row.reference), Answer(row.reference)]
    both[place] = answer
    scores = await _scores(judge, row, both, sums)
    (mine, why), (theirs, _) = scores[place], scores[1 - place]
    if mine is None or theirs is None:
        return None, why or TIED
    return (None, TIED) if mine == theirs else (float(mine > theirs), None)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
