"""Every way to compute a packed row gives what the plain computation gives, values and gradients, windows included."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from dpo_service.train.attention import flex, interface, sdpa, varlen
from dpo_service.train.attention.layout import Segment
from tests.unit.train.attention_kit import plain, random_row

ASKED = [{}, {"window": 7}, {"window": 40}, {"softcap": 0.7}, {"window": 20, "softcap": 0.7}]


def assert_equal(row, found, expected):
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(row.gradients(found), row.gradients(expected), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("seed", range(3))
def test_sdpa_equals_the_plain_computation(seed, asked):
    row = random_row(seed)
    assert_equal(row, sdpa.attend(*row.states, row.layout, scaling=None, **asked), plain(row, **asked))


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """torch refuses FlexAttention's backward pass on a CPU, where it has only the uncompiled one. That is what is
    wanted here."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    torch._dynamo.reset()


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_the_plain_computation(flex_on_cpu, asked):
    row = random_row(1)
    assert_equal(row, flex.attend(*row.states, row.layout, scaling=None, **asked), plain(row, **asked))


def test_flex_is_traced_but_twice_for_rows_of_many_lengths():
    """Once as it is, once with the length left open; each trace is a compilation on CUDA."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    traced = torch.compile(torch_flex.flex_attention, backend="eager")
    for seed in range(5):
        row = random_row(seed)
        states, mask = [tensor.detach() for tensor in row.states], flex.block_mask(row.layout, None)
        found = traced(*states, block_mask=mask, enable_gqa=True)
        assert torch.allclose(found.transpose(1, 2), plain(row), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("window", [None, 1, 30, 200])
@pytest.mark.parametrize("seed", range(12))
def test_blocks_hold_all_that_is_seen(seed, window):
    """Against torch's own block mask, which looks at every entry; ours may ask where all or nothing is seen."""
    row = random_row(seed, largest=(20, 90, 400)[seed % 3])
    mask = flex.block_mask(row.layout, window)
    length = row.layout.segments[-1].end
    theirs = torch_flex.create_block_mask(mask.mask_mod, 1, 1, length, length, device="cpu")
    full, mine_full = _dense(theirs.full_kv_num_blocks, theirs.full_kv_indices), _dense(*_full(mask))
    some, mine_some = _dense(theirs.kv_num_blocks, theirs.kv_indices), _dense(mask.kv_num_blocks, mask.kv_indices)
    assert not (mine_full & ~full).any()
    assert not ((some | full) & ~(mine_some | mine_full)).any()
    assert not (mine_some & mine_full).any()


def _full(mask):
    return mask.full_kv_num_blocks, mask.full_kv_indices


def _dense(counts, indices):
    counts, indices = counts[0, 0], indices[0, 0].long()
    dense = torch.zeros_like(indices, dtype=torch.bool)
    return dense.scatter(1, indices, torch.arange(indices.shape[1]) < counts[:, None])


def test_long_rows_leave_most_blocks_out():
    """What the block mask is for: pairs do not meet, nor do the answers of one."""
    layout = interface.row_layout([Segment(at, 256, 256, 256) for at in range(0, 7680, 768)], torch.device("cpu"))
    mask = flex.block_mask(layout, None)
    # in a pair 6 query blocks see, in blocks: 1 2 | 3 4 | 3 4; of these the last is the diagonal
    assert int(mask.kv_num_blocks.sum()) == 10 * 6
    assert int(mask.full_kv_num_blocks.sum()) == 10 * (0 + 1 + 2 + 3 + 2 + 3)


def reference_kernel(query, key, value, query_ends, key_ends, most_q, most_k, *, scale, window_size):
    """What the variable-length kernel says it computes, a sequence at a time."""
    outputs = []
    for number in range(len(query_ends) - 1):
        rows, columns = (slice(int(ends[number]), int(ends[number + 1])) for ends in (query_ends, key_ends))
        q, k, v = (t.transpose(0, 1)[None] for t in (query[rows], key[columns], value[columns]))
        assert q.shape[2] <= most_q
        assert k.shape[2] <= most_k
        shape, offset = (q.shape[2], k.shape[2]), k.shape[2] - q.shape[2]
        sees = torch.ones(shape, dtype=torch.bool).tril(offset + window_size[1])
        if window_size[0] >= 0:
            sees = sees.triu(offset - window_size[0])
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, sees, scale=scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("asked", [{}, {"window": 7}, {"window": 40}])
@pytest.mark.parametrize("seed", range(3))
def test_varlen_equals_the_plain_computation(monkeypatch, seed, asked):
    monkeypatch.setattr(varlen, "kernel", lambda: reference_kernel)
    row = random_row(seed)
    assert_equal(row, varlen.attend(*row.states, row.layout, scaling=None, **asked), plain(row, **asked))


def test_the_kernel_of_this_torch_takes_what_we_give():
    """It refuses tensors that are not on CUDA only after it has bound its arguments."""
    row = random_row(0, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"_flash_attention_forward|CPU"):
        varlen.attend(*row.states, row.layout, scaling=None, window=7)


def test_cpu_rows_are_computed_by_sdpa_unless_told_otherwise():
    row = random_row(0)
    query, _, value = row.states
    assert interface.chosen(query, value, row.layout, None) == "sdpa"
    with interface.using("flex"):
        layout = interface.row_layout(row.layout.segments, query.device)
    assert interface.chosen(query, value, layout, None) == "flex"


def test_under_autocast_all_states_have_its_precision(monkeypatch):
    """Rotary embeddings leave queries and keys in float32 beside values in bfloat16."""
    row = random_row(0)
    states = [t.detach() for t in row.states]
    states[2] = states[2].bfloat16()
    seen = []
    monkeypatch.setitem(interface.BACKENDS, "sdpa", lambda *t, **_: seen.extend(t[:3]) or t[0])
    with torch.autocast("cpu", torch.bfloat16):
        interface.segment_attention(torch.nn.Identity(), *states, None, segment_layout=row.layout)
    assert {t.dtype for t in seen} == {torch.bfloat16}
