"""Where pairs come from: one small class a source, and what they share.

online, self_rewarding    judged                    best against worst (`pairs.pairs_of`)
rso                       judged                    rejection sampling of the reward (`rejection`)
sppo                      judged                    win probabilities over the samples (`winning`), soft labels
spin                      nobody judges             the row's own answer against a sample
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dpo_service.online.judges.metrics import Counted, JudgeSums
from dpo_service.online.judges.port import TIED, Answer, JudgeRequest, Verdict
from dpo_service.online.pairs import ALIKE, CUT_OFF, TOO_FEW, pairs_of
from dpo_service.online.port import Sample
from dpo_service.online.prompts import PromptRow
from dpo_service.online.rejection import first_round_pairs, rejection_sample
from dpo_service.online.steps import PairRow
from dpo_service.online.winning import best_and_worst, by_comparison, by_score
from dpo_service.specs.pairing import PairingSpec

OWN = -1
"""The place of the row's own answer."""
NO_REFERENCE = "no_reference"
RAN_OUT = "candidates_ran_out"


@dataclass(frozen=True)
class Choice:
    """A pair by the places of its answers."""

    chosen: int
    rejected: int
    label: float | None = None


@dataclass(frozen=True)
class Chosen:
    choices: tuple[Choice, ...]
    dropped: str | None = None
    """Why there is none."""
    verdict: Verdict | None = None


class Source(Protocol):
    async def choose(self, prompt: PromptRow, answers: Sequence[Answer], seed: str) -> Chosen:
        """The pairs of a prompt. `seed` names its turn: chance depends on nothing else.

        Raises:
            JudgeError: no verdicts can be had at all.
        """
        ...

    def sums(self) -> JudgeSums:
        """What the judge did since the last call."""
        ...

    async def close(self) -> None: ...


class Judged:
    """The best against the worst, or as `pairing` says, of what a judge scored."""

    def __init__(self, judge: Counted, pairing: PairingSpec) -> None:
        self._judge, self._pairing = judge, pairing

    async def choose(self, prompt: PromptRow, answers: Sequence[Answer], seed: str) -> Chosen:
        verdict = await self._judge.judge(request_of(prompt, answers))
        pairing = pairs_of(answers, verdict, self._pairing, seed)
        choices = tuple(Choice(pair.chosen, pair.rejected) for pair in pairing.pairs)
        return Chosen(choices, pairing.dropped, verdict)

    def sums(self) -> JudgeSums:
        return self._judge.take()

    async def close(self) -> None:
        await self._judge.close()


class Rejection(Judged):
    """RSO: of the initial policy's answers those that the optimal policy would give, in random pairs by reward."""

    def __init__(self, judge: Counted, beta: float, wanted: int) -> None:
        super().__init__(judge, PairingSpec())
        self._beta, self._wanted = beta, wanted

    async def choose(self, prompt: PromptRow, answers: Sequence[Answer], seed: str) -> Chosen:
        verdict = await self._judge.judge(request_of(prompt, answers))
        rewards = [score if answer.finished else None for score, answer in zip(verdict.scores, answers, strict=True)]
        accepted = rejection_sample(rewards, self._wanted, self._beta, seed)
        pairs = first_round_pairs(accepted.places, rewards, seed)
        choices = tuple(
            Choice(pair.chosen, pair.rejected)
            for pair in pairs
            if answers[pair.chosen].text != answers[pair.rejected].text
        )
        why = None if choices else RAN_OUT if len(accepted.places) < 2 else TIED
        return Chosen(choices, why, verdict)


class Winning(Judged):
    """SPPO: the answers with the highest and the lowest probability to beat the policy; the label is the former's."""

    def __init__(self, judge: Counted, scale: float) -> None:
        """`scale` as in `winning.by_score`, for judges that score and do not compare."""
        super().__init__(judge, PairingSpec())
        self._scale = scale

    async def choose(self, prompt: PromptRow, answers: Sequence[Answer], seed: str) -> Chosen:
        verdict = await self._judge.judge(request_of(prompt, answers))
        probabilities = by_comparison(verdict) if verdict.pairs else by_score(verdict.scores, self._scale)
        if all(one is None for one in probabilities):
            return Chosen((), TOO_FEW, verdict)
        pair = best_and_worst(probabilities)
        if pair is None:
            return Chosen((), TIED, verdict)
        if not answers[pair.chosen].finished:
            return Chosen((), CUT_OFF, verdict)
        if answers[pair.chosen].text == answers[pair.rejected].text:
            return Chosen((), ALIKE, verdict)
        return Chosen((Choice(pair.chosen, pair.rejected, pair.p_chosen),), None, verdict)


class SelfPlay:
    """SPIN: the row's own answer is chosen, the first sample that differs from it rejected (arXiv:2401.01335)."""

    async def choose(self, prompt: PromptRow, answers: Sequence[Answer], seed: str) -> Chosen:
        if not prompt.answer_ids:
            return Chosen((), NO_REFERENCE)
        for place, answer in enumerate(answers):
            if answer.token_ids != prompt.answer_ids:
                return Chosen((Choice(OWN, place),))
        return Chosen((), ALIKE)

    def sums(self) -> JudgeSums:
        return JudgeSums()

    async def close(self) -> None:
        """Nothing is open."""


def request_of(prompt: PromptRow, answers: Sequence[Answer]) -> JudgeRequest:
    return JudgeRequest(prompt.text, tuple(answers), prompt.token_ids, prompt.reference, prompt.row)


def pair_row(position: int, prompt: PromptRow, samples: Sequence[Sample], choice: Choice) -> PairRow:
    """The tokens of a choice."""
    sides = [None if place == OWN else samples[place] for place in (choice.chosen, choice.rejected)]
    chosen, rejected = (prompt.answer_ids if one is None else one.token_ids for one in sides)
    chosen_logp, rejected_logp = (None if one is None else one.logp for one in sides)
    sampled = [one for one in sides if one is not None]
    return PairRow(
        position=position,
        prompt=prompt.token_ids,
        chosen=chosen,
        rejected=rejected,
        version=min(one.version for one in sampled),
        chosen_logp=chosen_logp,
        rejected_logp=rejected_logp,
        truncated=not all(one.finished for one in sampled),
        label=choice.label,
    )
