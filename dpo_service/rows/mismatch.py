"""KTO's mismatched answers: for each row the answer of another row, to which its prompt has nothing to say.

How far the policy has moved on these in general is what a reward must exceed (arXiv:2402.01306, eq. 7 and section 4.1:
prompt i with answer i - 1 of the batch). Which rows go together is decided once for a split and not for a batch, so the
reference's log-probabilities of them can be cached, and a step's rows bring their mismatched answers with them however
they are cut into micro-batches, spread over workers or resumed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpo_service.errors import InvalidData
from dpo_service.rows.holdout import mix


def mismatched_rows(prompts: NDArray[np.uint64], seed: int) -> NDArray[np.int64]:
    """For each row the position of another one that has another prompt; `prompts` are hashes.

    Rows are put in an order drawn from `seed`, those of one prompt together; from those after its prompt's, each row
    takes the one that stands where it stands among its own.

    Raises:
        InvalidData: all rows have the same prompt.
    """
    order = np.argsort(mix(prompts, seed), kind="stable")
    _, starts, groups, sizes = np.unique(
        mix(prompts[order], seed), return_index=True, return_inverse=True, return_counts=True
    )
    if len(starts) < 2:
        raise InvalidData(
            "all rows have the same prompt, and KTO measures each prompt against another's answer too; add rows with "
            "other prompts"
        )
    places, rows = np.arange(len(order)), len(order)
    start, size = starts[groups], sizes[groups]
    found = np.empty(rows, np.int64)
    found[order] = order[(start + size + (places - start) % (rows - size)) % rows]
    return found
