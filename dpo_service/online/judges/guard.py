"""The end of a job whose judge says too little: training would go on with what happens to be left."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from dpo_service.errors import TooFewVerdicts

WINDOW = 64
LEAST_SHARE = 0.5


class WindowGuard:
    """Looks at the last `window` judged prompts; the loop notes why each gave no pair (None = it gave one)."""

    def __init__(self, window: int = WINDOW, least_share: float = LEAST_SHARE) -> None:
        self._least = least_share
        self._last: deque[str | None] = deque(maxlen=window)

    def note(self, dropped: str | None) -> None:
        """
        Raises:
            TooFewVerdicts: the window is full, and under its least share of prompts gave a pair.
        """
        self._last.append(dropped)
        valid = sum(why is None for why in self._last)
        if len(self._last) == self._last.maxlen and valid < self._least * len(self._last):
            raise TooFewVerdicts(self._sentence(valid))

    def counters(self) -> list[str | None]:
        """The window, for a checkpoint."""
        return list(self._last)

    def resume(self, window: Iterable[str | None]) -> None:
        self._last.extend(window)

    def _sentence(self, valid: int) -> str:
        reasons = Counter(why for why in self._last if why is not None)
        told = ", ".join(f"{why}: {count}" for why, count in reasons.most_common())
        return (
            f"only {valid} of the last {len(self._last)} judged prompts gave a pair ({told}); mend the judge "
            "(endpoint, rubric or rules), or sample answers that differ more"
        )
