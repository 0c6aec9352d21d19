"""The policy that the loss measures against: the initial one. (One that moves: moving.py.)

Shapes: P pairs, S = 2P sequences, chosen first. Log-probabilities are float32 sums over the answer's tokens.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dpo_service.errors import TrainingError
from dpo_service.manifests.dataset import ANSWERS
from dpo_service.rows.plan import micro_batches
from dpo_service.specs.run import BatchSpec
from dpo_service.train.batch import MicroBatch, collate
from dpo_service.train.logprobs import completion_logps
from dpo_service.train.losses import without_tail
from dpo_service.train.policy import autocast, base_of, load_model
from dpo_service.train.rows import RowTable

ReferenceLogps = tuple[Tensor, Tensor | None]
"""Of the chosen and the rejected answers, [P] each; of single answers the first only."""
Reference = Callable[[MicroBatch], ReferenceLogps | None]
"""Log-probabilities of a micro-batch; None for losses without a reference."""


def no_reference(batch: MicroBatch) -> None:
    return None


def cached_reference(batch: MicroBatch) -> ReferenceLogps:
    """As computed by the data stage."""
    if batch.ref_chosen_P is None or (batch.paired and batch.ref_rejected_P is None):
        raise TrainingError("the dataset holds no reference log-probabilities, and the job says they are cached")
    return batch.ref_chosen_P, batch.ref_rejected_P


class LiveReference:
    """Computed beside the policy: by a frozen copy, or by the policy itself with its adapter off.

    `ld_alpha` as in LossSpec: what the policy's tails count, the reference's do. `within` is what `model` is put in
    while it computes, where that is something else.
    """

    def __init__(
        self,
        model: Any,
        precision: str,
        ld_alpha: float = 1.0,
        *,
        within: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._model, self._precision, self._ld_alpha = model, precision, ld_alpha
        self._within = getattr(model, "disable_adapter", contextlib.nullcontext) if within is None else within

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> ReferenceLogps:
        with self._within(), autocast(batch.input_ids_BL.device, self._precision):
            completions = completion_logps(base_of(self._model), batch)
        logps_S = without_tail(completions.logps_S, completions.tail_S, self._ld_alpha)
        return logps_S[: batch.rows], logps_S[batch.rows :] if batch.paired else None


def build_reference(
    mode: str, policy: Any, frozen_copy: Callable[[], Any], precision: str, ld_alpha: float = 1.0
) -> Reference:
    """`mode` as in ReferenceSpec, `ld_alpha` as in LossSpec.

    `frozen_copy` loads the job's own start, never resumed weights.
    """
    if mode == "none":
        return no_reference
    if mode == "cached":
        return cached_reference
    if base_of(policy) is not policy:
        return LiveReference(policy, precision, ld_alpha)
    return LiveReference(frozen_copy(), precision, ld_alpha)


class ReferenceScorer:
    """Reference log-probabilities for the data stage: a callable class for an actor pool; needs no Ray itself.

    It uses as many threads as OMP_NUM_THREADS says, and a GPU where it is given one.
    """

    def __init__(self, model_dir: str, precision: str, batch: BatchSpec, ld_alpha: float = 1.0) -> None:
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(Path(model_dir), self._device, precision).requires_grad_(False)
        self._reference = LiveReference(model, precision, ld_alpha)
        self._batch = batch

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`batch` (columns prompt and two `ANSWERS`: lists of token ids) with a float32 column for each answer added,
        ref_chosen and so on. Rows of like length are computed together; their order stays."""
        rows = RowTable(batch)
        answers = ANSWERS[rows.kind]
        scores = np.zeros((len(answers), len(rows)), dtype=np.float32)
        limits = self._batch.micro_batch_size, self._batch.micro_batch_tokens
        for indices in micro_batches(range(len(rows)), rows.lengths, *limits):
            found = self._reference(collate(rows.whole(indices)).to(self._device))
            scores[:, indices] = torch.stack([logps_P for logps_P in found if logps_P is not None]).cpu().numpy()
        for name, column in zip(answers, scores, strict=True):
            batch = batch.append_column(f"ref_{name}", pa.array(column, pa.float32()))
        return batch
