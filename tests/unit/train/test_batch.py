"""The packed row, and its padded twin, by hand."""

from __future__ import annotations

import pytest
import torch

from dpo_service.train.attention.layout import Segment
from dpo_service.train.batch import collate, padded
from dpo_service.train.rows import Example

PAIRS = [
    Example(prompt=[11, 12], chosen=[21, 22], rejected=[31], ref_chosen=-1.0, ref_rejected=-2.0),
    Example(prompt=[13], chosen=[23], rejected=[33, 34], truncated=True, ref_chosen=-3.0, ref_rejected=-4.0),
]


def test_pairs_lie_end_to_end_with_the_prompt_once():
    batch = collate(PAIRS)
    assert batch.input_ids_BL.tolist() == [[11, 12, 21, 22, 31, 13, 23, 33, 34]]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert batch.segments == (Segment(0, 2, 2, 1), Segment(5, 1, 1, 2))
    assert batch.attention_mask_BL is None


def test_each_completion_token_has_its_predictor_and_owner_chosen_first():
    batch = collate(PAIRS)
    assert batch.target_C.tolist() == [21, 22, 23, 31, 33, 34]
    assert batch.source_C.tolist() == [1, 2, 5, 1, 5, 7]
    assert batch.owner_C.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.lengths_S.tolist() == [2, 1, 1, 2]


def test_padded_holds_the_same_sequences_in_the_same_order():
    batch = padded(collate(PAIRS))
    assert batch.input_ids_BL.tolist() == [[11, 12, 21, 22], [13, 23, 0, 0], [11, 12, 31, 0], [13, 33, 34, 0]]
    assert batch.attention_mask_BL.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 2]]
    assert batch.source_C.tolist() == [1, 2, 4, 9, 12, 13]
    assert torch.equal(batch.target_C, batch.input_ids_BL.flatten()[batch.source_C + 1])
    assert torch.equal(batch.owner_C, collate(PAIRS).owner_C)


def test_counts_and_references():
    for batch in (collate(PAIRS), padded(collate(PAIRS))):
        assert (batch.rows, batch.sequences, batch.paired, batch.truncated) == (2, 4, True, 1)
        assert batch.tokens == 12, "a prompt counts for each of its answers"
        assert batch.ref_chosen_P.tolist() == [-1.0, -3.0]
        assert batch.ref_rejected_P.tolist() == [-2.0, -4.0]


def test_supervised_rows_hold_one_answer():
    batch = collate([Example(prompt=[1, 2], chosen=[3]), Example(prompt=[4], chosen=[5, 6])])
    assert batch.input_ids_BL.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.source_C.tolist() == [1, 3, 4]
    assert not batch.paired
    assert padded(batch).input_ids_BL.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("empty", [{"prompt": []}, {"chosen": []}, {"rejected": []}])
def test_an_empty_part_is_refused(empty):
    with pytest.raises(AssertionError, match="empty"):
        collate([Example(**{"prompt": [1], "chosen": [2], "rejected": [3]} | empty)])
