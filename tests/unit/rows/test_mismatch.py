"""Which row lends its answer to which prompt."""

import numpy as np
import pytest

from dpo_service.errors import InvalidData
from dpo_service.rows.mismatch import mismatched_rows


def hashes(*prompts):
    return np.array([hash(("prompt", prompt)) % 2**63 for prompt in prompts], np.uint64)


@pytest.mark.parametrize("prompts", ["ab", "aab", "aabbcc", "abcdefgh", "aaaaaaab", "abababac" * 9])
@pytest.mark.parametrize("seed", range(5))
def test_a_row_never_meets_an_answer_to_its_own_prompt(prompts, seed):
    others = mismatched_rows(hashes(*prompts), seed)
    assert len(others) == len(prompts)
    assert all(prompts[other] != prompt for prompt, other in zip(prompts, others, strict=True))


def test_every_answer_is_used_once_where_prompts_are_repeated_alike():
    for prompts in ("abcdefg", "aabbccdd"):
        assert sorted(mismatched_rows(hashes(*prompts), 0)) == list(range(len(prompts)))


def test_the_seed_decides():
    many = hashes(*range(50))
    assert (mismatched_rows(many, 1) == mismatched_rows(many, 1)).all()
    assert (mismatched_rows(many, 1) != mismatched_rows(many, 2)).any()


def test_one_prompt_alone_is_refused():
    with pytest.raises(InvalidData, match="the same prompt"):
        mismatched_rows(hashes(*"aaa"), 0)
