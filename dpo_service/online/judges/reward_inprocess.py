"""A reward model in this process, computed by transformers.

    scores(sequences) ... ──> waiting ──> one thread ──> batches of about the same length ──> scores

Sequences that wait while the model computes are computed together next. Shapes: B sequences, L tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_service.errors import InvalidSpec, JudgeError, ModelRefused
from dpo_service.online.judges.reward_model import Ids
from dpo_service.specs.judge import RewardModelJudgeSpec
from dpo_service.train.pretrained import read
from dpo_service.train.rope import own_frequencies

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RewardModel:
    """Scores of token sequences."""

    def __init__(self, directory: Path, spec: RewardModelJudgeSpec, device: torch.device | str = "cpu") -> None:
        """
        Raises:
            InvalidSpec: no sequence-classification checkpoint, or one with more than one output.
        """
        self._model = _load(directory, spec).to(device)
        self._device = device
        # Where a score depends on the longest sequence of its batch, each is a batch of its own.
        self._batch_tokens = 1 if own_frequencies(self._model) else spec.batch_tokens
        self._vocabulary = self._model.get_input_embeddings().num_embeddings

    def scores(self, sequences: Sequence[Ids]) -> list[float]:
        """One score a sequence, float32; NaN or infinite where the model says so. Pads right, by length."""
        scores = [math.nan] * len(sequences)
        for places in by_length([len(ids) for ids in sequences], self._batch_tokens):
            found = self._batch([sequences[place] for place in places])
            for place, score in zip(places, found, strict=True):
                scores[place] = score
        return scores

    def _batch(self, sequences: Sequence[Ids]) -> list[float]:
        pad = padding_id(sequences, self._model.config.get_text_config().pad_token_id, self._vocabulary)
        if pad is None:
            half = len(sequences) // 2
            return self._batch(sequences[:half]) + self._batch(sequences[half:])
        return self._forward(sequences, pad)

    @torch.inference_mode()
    def _forward(self, sequences: Sequence[Ids], pad: int) -> list[float]:
        length = max(len(ids) for ids in sequences)
        ids_BL = torch.tensor([ids + [pad] * (length - len(ids)) for ids in sequences], device=self._device)
        mask_BL = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in sequences], device=self._device)
        config = self._model.config.get_text_config()
        own = config.pad_token_id
        # transformers takes for a row's last token the last that is not this id: one that ends an answer misleads it.
        config.pad_token_id = pad
        try:
            logits_B1 = self._model(input_ids=ids_BL, attention_mask=mask_BL).logits
        finally:
            config.pad_token_id = own
        scores: list[float] = logits_B1[:, 0].float().tolist()
        return scores


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of sequences, the longest first, in batches of at most `batch_tokens` with padding (or one sequence)."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    while order:
        take = max(1, batch_tokens // max(lengths[order[0]], 1))
        yield order[:take]
        order = order[take:]


def padding_id(sequences: Sequence[Ids], own: int | None, vocabulary: int) -> int | None:
    """An id to pad with that is no token of these sequences: the model's own, else the least. None = all are used.

    Sequences of one length need none: -1, which is no id.
    """
    if len({len(ids) for ids in sequences}) == 1:
        return -1
    used = set(itertools.chain.from_iterable(sequences))
    if own is not None and own not in used:
        return own
    return next((number for number in range(vocabulary) if number not in used), None)


def _load(directory: Path, spec: RewardModelJudgeSpec) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(directory, **local)
        _refuse_other_models(config, spec)
        model = read(AutoModelForSequenceClassification, directory, dtype=_DTYPES[spec.precision])
    except InvalidSpec:
        raise
    except ModelRefused as error:
        raise InvalidSpec(
            f"reward model {spec.model!r} cannot be used: {error.message}", param="judge.model"
        ) from error
    except (OSError, KeyError, ValueError) as error:
        raise InvalidSpec(f"{spec.model!r} cannot be loaded as a reward model: {error}", param="judge.model") from error
    return model


def _refuse_other_models(config: Any, spec: RewardModelJudgeSpec) -> None:
    """transformers would load them and invent the head."""
    names = config.architectures or []
    if config.num_labels != 1 or not any("SequenceClassification" in name for name in names):
        raise InvalidSpec(
            f"{spec.model!r} is no reward model (architecture {names}, {config.num_labels} outputs); give a "
            "sequence-classification checkpoint with num_labels=1",
            param="judge.model",
        )


class InProcess:
    """A Scorer: the model on a thread of this process."""

    def __init__(self, model: RewardModel) -> None:
        self._model = model
        self._waiting: list[tuple[Sequence[Ids], asyncio.Future[list[float]]]] = []
        self._computing: asyncio.Task[None] | None = None

    async def scores(self, sequences: Sequence[Ids]) -> list[float]:
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((sequences, future))
        if self._computing is None or self._computing.done():
            self._computing = asyncio.create_task(self._compute_all())
        return await future

    async def _compute_all(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            sequences = [ids for several, _ in taken for ids in several]
            try:
                scores = iter(await asyncio.to_thread(self._model.scores, sequences))
            except Exception as error:
                for _, future in taken:
                    if not future.done():
                        future.set_exception(JudgeError(f"the reward model failed: {error!r}"))
                continue
            for several, future in taken:
                own = list(itertools.islice(scores, len(several)))
                if not future.done():  # whoever waited may have been cancelled
                    future.set_result(own)

    async def close(self) -> None:
        if self._computing is not None:
            await asyncio.gather(self._computing, return_exceptions=True)
