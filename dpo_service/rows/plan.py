"""Which rows form which optimizer step, on which rank, in which micro-batch: a pure function, fixed before training.

    epoch e:  a permutation of all rows (file order without shuffling), cut into batches; the last may be smaller
    step s:   batch s mod steps_per_epoch of epoch s div steps_per_epoch

So an epoch is a fixed sequence, resuming is "the steps after n", and the number of workers changes only who computes
what. `assign` gives every rank the same number of micro-batches (some may be empty), so that all make the same
collective calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class BatchPlan:
    """The batches of a run.

    Args:
        n_rows: rows of the training split; they are named by their index, 0 to n_rows - 1.
        batch_size: rows a step, over all ranks.
        n_epochs: how often every row is seen; `max_steps`, where given, decides instead (it may end within an epoch, or
            go on beyond the last).
        lengths: tokens of each row, for balance between the ranks; None = all alike.
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        n_epochs: int,
        max_steps: int | None,
        shuffle: bool,
        seed: int,
        lengths: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> None:
        assert n_rows > 0
        assert batch_size > 0
        self.n_rows = n_rows
        self.batch_size = batch_size
        self.steps_per_epoch = -(-n_rows // batch_size)
        self.total_steps = max_steps if max_steps is not None else n_epochs * self.steps_per_epoch
        self._shuffle, self._seed = shuffle, seed
        self._lengths = np.ones(n_rows, np.int64) if lengths is None else np.asarray(lengths, np.int64)
        assert len(self._lengths) == n_rows
        self._order = lru_cache(maxsize=2)(self._permutation)

    def rows(self, step: int) -> list[int]:
        """Global row indices of optimizer step `step` (from 0), in order."""
        assert 0 <= step < self.total_steps
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.batch_size
        return [int(row) for row in self._order(epoch)[start : start + self.batch_size]]

    def epoch(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / self.steps_per_epoch

    def tokens(self, step: int) -> int:
        return int(self._lengths[self.rows(step)].sum())

    def assign(
        self, step: int, world_size: int, micro_batch_size: int, micro_batch_tokens: int | None = None
    ) -> list[list[list[int]]]:
        """Row indices by rank and micro-batch: [rank][micro][row].

        The union over the ranks is `rows(step)`, whatever the world size. Ranks hold equally many rows but for one, and
        nearly equally many tokens; all have the same number of micro-batches, of at most `micro_batch_size` rows and
        `micro_batch_tokens` tokens (None = any number), but for a row that is longer by itself. One may be empty only
        where a rank has fewer rows than micro-batches.
        """
        rows = self.rows(step)
        lengths = self._lengths[rows]
        shares = _balance(lengths, world_size, -(-len(rows) // world_size))
        parts = [micro_batches(share, lengths, micro_batch_size, micro_batch_tokens) for share in shares]
        n_micro = max(len(part) for part in parts)
        return [[[rows[i] for i in sorted(micro)] for micro in _in_exactly(n_micro, part)] for part in parts]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return permutation(self.n_rows, epoch, self._shuffle, self._seed)


def permutation(n_rows: int, epoch: int, shuffle: bool, seed: int) -> NDArray[np.int64]:
    """The order of an epoch."""
    if not shuffle:
        return np.arange(n_rows, dtype=np.int64)
    return np.random.default_rng((seed, epoch)).permutation(n_rows)


class PromptOrder:
    """The order in which prompts are sampled from: epoch after epoch without an end. Which step a prompt's pair falls
    to depends on how many of those before it gave one, so a run goes on from a position and not from a step."""

    def __init__(
        self, n_rows: int, batch_size: int, n_epochs: int, max_steps: int | None, shuffle: bool, seed: int
    ) -> None:
        self.n_rows = n_rows
        self.steps_per_epoch = max(1, n_rows // batch_size)
        self.total_steps = max_steps if max_steps is not None else max(1, n_epochs * n_rows // batch_size)
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(n_rows, epoch, shuffle, seed))

    def row(self, position: int) -> int:
        """The row at a position, from 0."""
        epoch, place = divmod(position, self.n_rows)
        return int(self._order(epoch)[place])

    def epoch(self, position: int) -> float:
        """Epochs done before a position."""
        return position / self.n_rows


def _balance(lengths: NDArray[np.int64], ranks: int, capacity: int) -> list[list[int]]:
    """Positions by rank: the longest first, each to the rank with the fewest tokens that has room (LPT scheduling)."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    # Ranks differ by one row at most: `full` of them may hold `capacity`, the others one fewer.
    full = len(lengths) - ranks * (capacity - 1)
    for position in np.argsort(-lengths, kind="stable").tolist():
        open_ranks = [r for r in range(ranks) if len(shares[r]) < capacity - (0 if full > 0 else 1)]
        rank = min(open_ranks, key=lambda r: (loads[r], r))
        shares[rank].append(position)
        loads[rank] += int(lengths[position])
        full -= len(shares[rank]) == capacity
    return shares


def micro_batches(
    rows: Sequence[int], lengths: NDArray[np.int64], max_rows: int, max_tokens: int | None
) -> list[list[int]]:
    """`rows` (places in `lengths`) in runs of similar length, the longest first, each as large as the limits allow."""
    runs: list[list[int]] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (-int(lengths[row]), row)):
        length = int(lengths[row])
        full = not runs or len(runs[-1]) == max_rows or (max_tokens is not None and tokens + length > max_tokens)
        if full:
            runs.append([])
            tokens = 0
        runs[-1].append(row)
        tokens += length
    return runs


def _in_exactly(number: int, runs: list[list[int]]) -> list[list[int]]:
    """The same rows in `number` runs: those with the most rows are halved, and where there is nothing to halve, empty
    ones come last."""
    runs = list(runs)
    while len(runs) < number and any(len(run) > 1 for run in runs):
        place = max(range(len(runs)), key=lambda i: (len(runs[i]), -i))
        half = -(-len(runs[place]) // 2)
        runs[place : place + 1] = [runs[place][:half], runs[place][half:]]
    return runs + [[] for _ in range(number - len(runs))]
