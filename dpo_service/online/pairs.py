"""From a verdict to pairs.

    scores, one an answer ── less a penalty for length ──> who may be chosen, who rejected ──> pairs that are decided

A prompt without a pair is dropped, and the reason counted. A missing score is no score: that answer takes no part.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dpo_service.online.judges.port import TIED, Answer, Verdict
from dpo_service.specs.pairing import PairingSpec

ALIKE = "same_text"
BELOW_MARGIN = "below_margin"
CUT_OFF = "cut_off"
TOO_FEW = "too_few_scores"


@dataclass(frozen=True)
class Pair:
    """Two answers by their places, and by how much the chosen one's score is higher."""

    chosen: int
    rejected: int
    margin: float


@dataclass(frozen=True)
class Pairing:
    """`dropped` says why there is no pair; None where there is one."""

    pairs: tuple[Pair, ...] = ()
    dropped: str | None = None


@dataclass(frozen=True)
class _Candidate:
    place: int
    score: float
    length: int
    may_win: bool


def pairs_of(answers: Sequence[Answer], verdict: Verdict, spec: PairingSpec, seed: str) -> Pairing:
    """The pairs of one prompt. `seed` names the prompt and its turn (job, step, row): the random choice depends on
    nothing else."""
    candidates = _candidates(answers, verdict, spec)
    wins = _wins(candidates, verdict, answers, spec.margin)
    chosen = list(_CHOICES[spec.choose](candidates, wins, spec, seed)) if wins.allowed else []
    if chosen:
        return Pairing(tuple(chosen))
    return Pairing(dropped=_reason(answers, verdict, candidates, wins))


@dataclass(frozen=True)
class _Wins:
    """What may become a pair, and why the rest of the comparisons may not."""

    allowed: dict[tuple[int, int], Pair]
    refused: Counter[str]


def _candidates(answers: Sequence[Answer], verdict: Verdict, spec: PairingSpec) -> list[_Candidate]:
    """The answers that take part, the best first; of equals, the first sampled."""
    penalty = spec.length.penalty if spec.length else 0.0
    found = []
    for place, (answer, score) in enumerate(zip(answers, verdict.scores, strict=True)):
        if score is None or (spec.cut_off == "dropped" and not answer.finished):
            continue
        length = length_of(answer)
        may_win = answer.finished or spec.cut_off == "any"
        found.append(_Candidate(place, score - penalty * length, length, may_win))
    return sorted(found, key=lambda one: (-one.score, one.place))


def length_of(answer: Answer) -> int:
    """In tokens; in words where an answer did not come with tokens."""
    return len(answer.token_ids) or len(answer.text.split())


def _wins(candidates: Sequence[_Candidate], verdict: Verdict, answers: Sequence[Answer], margin: float) -> _Wins:
    allowed: dict[tuple[int, int], Pair] = {}
    refused: Counter[str] = Counter()
    for winner, loser in itertools.combinations(candidates, 2):
        why = _why_not(winner, loser, verdict, answers, margin)
        if why is None:
            allowed[winner.place, loser.place] = Pair(winner.place, loser.place, winner.score - loser.score)
        else:
            refused[why] += 1
    return _Wins(allowed, refused)


def _why_not(
    winner: _Candidate, loser: _Candidate, verdict: Verdict, answers: Sequence[Answer], margin: float
) -> str | None:
    if answers[winner.place].text == answers[loser.place].text:
        return ALIKE
    if winner.score == loser.score:
        return TIED
    if winner.score - loser.score <= margin:
        return BELOW_MARGIN
    said = verdict.between(winner.place, loser.place)
    if said not in (None, "first"):  # the scores come from other comparisons; this one was not won
        return "missing" if said == "missing" else TIED
    return None if winner.may_win else CUT_OFF


def _reason(answers: Sequence[Answer], verdict: Verdict, candidates: Sequence[_Candidate], wins: _Wins) -> str:
    """The commonest reason among the prompt's comparisons or, with under two scores, among its answers."""
    if len(candidates) >= 2:
        return wins.refused.most_common(1)[0][0] if wins.refused else TIED
    missing = Counter(why for why in verdict.missing if why is not None)
    if missing:
        return missing.most_common(1)[0][0]
    return CUT_OFF if any(not answer.finished for answer in answers) else TOO_FEW


def _best_worst(candidates: Sequence[_Candidate], wins: _Wins, spec: PairingSpec, seed: str) -> Iterator[Pair]:
    """The best that may win against the worst; with a tolerance, of those about as good and as bad the nearest in
    length."""
    tolerance = spec.length.tolerance if spec.length else 0.0
    top = next((one.score for one in candidates if one.may_win), None)
    if top is None:
        return
    bottom = candidates[-1].score
    best = [one for one in candidates if one.may_win and one.score >= top - tolerance]
    worst = [one for one in reversed(candidates) if one.score <= bottom + tolerance]
    fit = [(one, other) for one in best for other in worst if (one.place, other.place) in wins.allowed]
    if not tolerance:
        fit = fit[:1]
    if fit:
        one, other = min(fit, key=lambda pair: abs(pair[0].length - pair[1].length))
        yield wins.allowed[one.place, other.place]


def _all_pairs(candidates: Sequence[_Candidate], wins: _Wins, spec: PairingSpec, seed: str) -> Iterable[Pair]:
    return wins.allowed.values()


def _best_random(candidates: Sequence[_Candidate], wins: _Wins, spec: PairingSpec, seed: str) -> Iterator[Pair]:
    best = next(one.place for one in candidates if one.may_win)
    lesser = [pair for (winner, _), pair in wins.allowed.items() if winner == best]
    if lesser:
        yield random.Random(seed).choice(lesser)


_CHOICES = {"best_worst": _best_worst, "all_pairs": _all_pairs, "best_random": _best_random}
