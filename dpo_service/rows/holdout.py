"""Which rows of a file validate: decided alike when a job is admitted and when its data is prepared."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpo_service.errors import InvalidData
from dpo_service.rows.facts import Facts

Mask = NDArray[np.bool_]


def hold_out(facts: Facts, share: float, seed: int) -> Mask:
    """The rows that validate: all rows of about `share` of the prompts, picked by a hash of prompt and seed.

    So the same prompt never lies on both sides; each side gets one prompt at least. Rows that are left out are in
    neither.

    Raises:
        InvalidData: all rows have the same prompt.
    """
    kept = facts["reason"] == 0
    prompts = np.unique(facts["prompt"][kept])
    if len(prompts) < 2:
        raise InvalidData(
            "all rows have the same prompt, so none can be held out; upload a validation_file or set eval.split to 0"
        )
    count = min(max(round(share * len(prompts)), 1), len(prompts) - 1)
    held = prompts[np.argsort(mix(prompts, seed), kind="stable")[:count]]
    chosen: Mask = kept & np.isin(facts["prompt"], held)
    return chosen


def mix(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """splitmix64 (Steele et al., OOPSLA 2014) of each value and the seed."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
