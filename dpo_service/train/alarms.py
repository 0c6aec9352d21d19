"""What a run warns of: pure functions over its newest windows of metrics, so that a resumed run warns of the same.

    a window's sums ──> history ──> for each rule:  quiet ──raised()──> told once, a warning ──cleared()──> told, quiet
                           └── in the checkpoint's counters

A rule clears at another value than it is raised at, so one that lies at its limit is not told again and again. Windows
are pooled until they hold enough pairs, so a rule means the same at any batch size and `logging_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple

from dpo_service.train.metrics import length_correlation

Window = dict[str, float]
"""Sums over its rows (`SUMS`; answers that are not pairs have `rows` alone), its last `step` and that step's
`grad_norm`."""

PAIR_SUMS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "displaced",
    "gap",
    "gap_gap",
    "margin_margin",
    "gap_margin",
)
SUMS = ("rows", *PAIR_SUMS)

FEW_PAIRS, MANY_PAIRS = 64, 256
"""A share of pairs is known to about 6%, and to 3%."""
FEW_WINDOWS, MANY_WINDOWS = 5, 10
KEPT, MOST_KEPT = 64, 512
"""Windows of history: as many as the pairs above need, between these."""

DISPLACED, NO_LONGER_DISPLACED = 0.75, 0.5
GROWTH = 0.01
"""What a margin must win on itself to count as growing."""
BY_LENGTH, NO_LONGER_BY_LENGTH = 0.5, 0.3
EXPLODED, NO_LONGER_EXPLODED = 10.0, 3.0
NOT_LEARNT, LEARNT = 0.55, 0.6


@dataclass(frozen=True)
class Settings:
    """What of a run the rules ask for."""

    warmup_steps: int
    max_grad_norm: float
    lowers_chosen: bool = False
    """The loss is one that means to (apo_down)."""
    follows_policy: bool = False
    """Its pairs are answers of the policy of that step: of two that it says itself it seldom ranks the better higher,
    however much it learns."""


class Warned(NamedTuple):
    name: str
    text: str
    over: bool = False
    """It no longer holds."""


class Rule(NamedTuple):
    name: str
    raised: Callable[[Sequence[Window], Settings], str | None]
    """What was seen; None = nothing to warn of."""
    cleared: Callable[[Sequence[Window], Settings], bool]
    advice: str
    """Why it matters, and what mends it."""


class Alarms:
    """The rules, what they know, and which are raised."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._history: list[Window] = []
        self._raised: set[str] = set()

    def see(self, window: Window) -> list[Warned]:
        """Take in the newest window; returns what to tell of it."""
        self._history = trimmed([*self._history, window])
        return [warned for rule in RULES if (warned := self._judge(rule)) is not None]

    def _judge(self, rule: Rule) -> Warned | None:
        if rule.name in self._raised:
            if not rule.cleared(self._history, self._settings):
                return None
            self._raised.remove(rule.name)
            return Warned(rule.name, f"The warning of {rule.name.replace('_', ' ')} no longer holds", over=True)
        seen = rule.raised(self._history, self._settings)
        if seen is None:
            return None
        self._raised.add(rule.name)
        return Warned(rule.name, f"{seen}. {rule.advice}")

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"history": self._history, "raised": sorted(self._raised)}

    def resume(self, counters: dict[str, Any]) -> None:
        self._history, self._raised = list(counters["history"]), set(counters["raised"])


def trimmed(history: list[Window]) -> list[Window]:
    """The newest windows, no more than the rules can ask for."""
    history = history[-MOST_KEPT:]
    pairs = accumulate(reversed([window["rows"] for window in history]))
    needed = 1 + sum(1 for held in pairs if held < MANY_PAIRS)
    return history[-max(KEPT, needed) :]


def newest(history: Sequence[Window], pairs: float, windows: int, *, after_step: int = 0) -> Sequence[Window] | None:
    """The fewest of the newest windows that hold `pairs` pairs and are at least `windows`; None if there are not yet,
    or what is trained on is not pairs. All of their steps come after `after_step`."""
    if not set(PAIR_SUMS) <= history[-1].keys():
        return None
    taken, held = 0, 0.0
    for window in reversed(history):
        if taken >= windows and held >= pairs:
            break
        taken, held = taken + 1, held + window["rows"]
    found = history[len(history) - taken :]
    enough = taken >= windows and held >= pairs and found[0]["step"] > after_step
    return found if enough else None


def pooled(windows: Sequence[Window]) -> Window:
    """The sums over several windows."""
    return {name: sum(window[name] for window in windows) for name in SUMS if name in windows[0]}


def mean(windows: Sequence[Window], name: str) -> float:
    return pooled(windows)[name] / pooled(windows)["rows"]


def margin(windows: Sequence[Window]) -> float:
    return mean(windows, "rewards/chosen") - mean(windows, "rewards/rejected")


def displacement_raised(history: Sequence[Window], settings: Settings) -> str | None:
    recent = newest(history, FEW_PAIRS, FEW_WINDOWS, after_step=settings.warmup_steps)
    if recent is None or settings.lowers_chosen:
        return None
    share, half = mean(recent, "displaced"), len(recent) // 2
    before, now = margin(recent[:half]), margin(recent[half:])
    if share < DISPLACED or now <= max(0.0, before + GROWTH * abs(before)):
        return None
    return (
        f"Likelihood displacement: {share:.0%} of the chosen answers of {_steps(recent)} are less likely than under "
        f"the reference, while the reward margin grows ({before:.3g} to {now:.3g})"
    )


def displacement_cleared(history: Sequence[Window], settings: Settings) -> bool:
    recent = newest(history, FEW_PAIRS, FEW_WINDOWS)
    return recent is not None and mean(recent, "displaced") <= NO_LONGER_DISPLACED


def length_raised(history: Sequence[Window], settings: Settings) -> str | None:
    recent = newest(history, MANY_PAIRS, FEW_WINDOWS, after_step=settings.warmup_steps)
    correlation = None if recent is None else length_correlation(pooled(recent))
    if recent is None or correlation is None or abs(correlation) < BY_LENGTH:
        return None
    kind = "longer" if correlation > 0 else "shorter"
    return (
        f"Length exploitation: over {_steps(recent)} the reward margin goes with how much {kind} the chosen answer is "
        f"(correlation {correlation:.2f}; chosen minus rejected {mean(recent, 'gap'):.1f} tokens)"
    )


def length_cleared(history: Sequence[Window], settings: Settings) -> bool:
    recent = newest(history, MANY_PAIRS, FEW_WINDOWS)
    correlation = None if recent is None else length_correlation(pooled(recent))
    return correlation is not None and abs(correlation) <= NO_LONGER_BY_LENGTH


def gradients_raised(history: Sequence[Window], settings: Settings) -> str | None:
    """Only a norm that clipping must act on: where the loss is all but zero, many times nothing is still nothing."""
    ratio, norm = _gradient_ratio(history), history[-1]["grad_norm"]
    if ratio is None or ratio < EXPLODED or norm <= settings.max_grad_norm:
        return None
    step = int(history[-1]["step"])
    return (
        f"Exploding gradients: the gradient norm of step {step} is {norm:.3g}, {ratio:.0f} times the median before it"
    )


def gradients_cleared(history: Sequence[Window], settings: Settings) -> bool:
    ratio = _gradient_ratio(history)
    return ratio is not None and ratio <= NO_LONGER_EXPLODED


def _gradient_ratio(history: Sequence[Window]) -> float | None:
    before = [window["grad_norm"] for window in history[-KEPT:-1]]
    usual = median(before) if len(before) >= MANY_WINDOWS else 0.0
    return history[-1]["grad_norm"] / usual if usual else None


def accuracy_raised(history: Sequence[Window], settings: Settings) -> str | None:
    recent = newest(history, MANY_PAIRS, MANY_WINDOWS, after_step=settings.warmup_steps)
    if recent is None or settings.follows_policy:
        return None
    accuracy = mean(recent, "rewards/accuracies")
    if accuracy > NOT_LEARNT:
        return None
    where = "below one half" if accuracy < 1 - NOT_LEARNT else "stuck at one half"
    return f"Reward accuracy is {where}: {accuracy:.2f} over {_steps(recent)}, after the warmup"


def accuracy_cleared(history: Sequence[Window], settings: Settings) -> bool:
    recent = newest(history, MANY_PAIRS, MANY_WINDOWS)
    return recent is not None and mean(recent, "rewards/accuracies") >= LEARNT


def _steps(windows: Sequence[Window]) -> str:
    pairs = int(sum(window["rows"] for window in windows))
    return f"the last {pairs} pairs (to step {int(windows[-1]['step'])})"


RULES = (
    Rule(
        "displacement",
        displacement_raised,
        displacement_cleared,
        "The model unlearns both answers, and what it wins goes to answers that nobody chose (arXiv 2410.08847). "
        "Set rpo_alpha (0.1 to 1), lower learning_rate, or raise beta",
    ),
    Rule(
        "length_exploitation",
        length_raised,
        length_cleared,
        "The model may learn how long a good answer is, not what makes it good (arXiv 2403.19159). "
        "Set length_penalty or ld_alpha where the loss takes it, or loss sigmoid_norm or method simpo, or balance data",
    ),
    Rule(
        "exploding_gradients",
        gradients_raised,
        gradients_cleared,
        "Clipping holds the update's size, its direction is that of a few rows. "
        "Lower learning_rate, raise warmup_ratio, or look for damaged rows in that step",
    ),
    Rule(
        "accuracy",
        accuracy_raised,
        accuracy_cleared,
        "The model does not learn which answer was chosen. See whether chosen and rejected are swapped or drawn at "
        "random; if they are right, raise learning_rate or n_epochs",
    ),
)
