"""The chunked head against the whole [tokens, vocabulary] computation."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_service.train.batch import collate
from dpo_service.train.head import Head, head_logps
from dpo_service.train.logprobs import completion_logps, split_head
from tests.unit.train.families import PACKED, PADDED, family
from tests.unit.train.test_attention import random_pairs

HEADS = [
    pytest.param(False, 1.0, None, id="plain"),
    pytest.param(True, 1.0, None, id="bias"),
    pytest.param(True, 0.25, None, id="scaled"),
    pytest.param(False, 2.0, 3.0, id="soft-capped"),
]


def whole(head, hidden_CH, target_C):
    """log softmax of all logits, by torch."""
    logits = head.scale * torch.nn.functional.linear(hidden_CH, head.module.weight, head.module.bias)
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits, -1).gather(1, target_C[:, None]).squeeze(1)


def make(bias, scale, softcap, dtype=torch.float64, tokens=11, vocabulary=13, hidden=6):
    torch.manual_seed(0)
    head = Head(nn.Linear(hidden, vocabulary, bias=bias, dtype=dtype), scale, softcap)
    hidden_CH = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    return head, hidden_CH, torch.randint(0, vocabulary, (tokens,))


@pytest.mark.parametrize(("bias", "scale", "softcap"), HEADS)
def test_gradcheck(bias, scale, softcap):
    head, hidden_CH, target_C = make(bias, scale, softcap)
    parameters = [hidden_CH, *head.module.parameters()]
    assert torch.autograd.gradcheck(lambda *_: head_logps(head, hidden_CH, target_C, 4)[0], parameters)


@pytest.mark.parametrize("chunk", [1, 4, 11, None])
@pytest.mark.parametrize(("bias", "scale", "softcap"), HEADS)
def test_equals_the_whole_computation(bias, scale, softcap, chunk):
    head, hidden_CH, target_C = make(bias, scale, softcap)
    inputs, weights_C = [hidden_CH, *head.module.parameters()], torch.linspace(-1, 2, 11, dtype=torch.float64)
    ours, theirs = head_logps(head, hidden_CH, target_C, chunk)[0], whole(head, hidden_CH, target_C)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x @ weights_C, inputs) for x in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("bias", "scale", "softcap"), HEADS)
def test_in_bfloat16_a_chunk_takes_nothing_from_the_one_before(bias, scale, softcap):
    """Chunks lie where the one before lay, the last one shorter; against one chunk of all, with the same products."""
    head, hidden_CH, target_C = make(bias, scale, softcap, dtype=torch.bfloat16)
    inputs = [hidden_CH, *head.module.parameters()]
    found, expected = (head_logps(head, hidden_CH, target_C, chunk, squares=True) for chunk in (4, 11))
    assert torch.allclose(found.logps_C, expected.logps_C, rtol=1e-5)
    assert torch.allclose(found.square_C, expected.square_C, rtol=1e-5)
    weights_C = torch.linspace(-1, 2, 11)
    ours, theirs = (torch.autograd.grad(logps.logps_C @ weights_C, inputs) for logps in (found, expected))
    assert torch.allclose(ours[0], theirs[0], rtol=1e-2, atol=1e-3)
    for a, b in zip(ours[1:], theirs[1:], strict=True):  # summed over chunks: rounded elsewhere
        assert torch.allclose(a, b, rtol=0.02, atol=0.02)


class Logits(TorchDispatchMode):
    """Notes the most rows of an array [rows, 13] that anything made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 13:
            self.most = max(self.most, len(out))
        return out


@pytest.mark.parametrize("kind", [nn.Linear, type("More", (nn.Linear,), {})])
def test_logits_exist_a_chunk_at_a_time(monkeypatch, kind):
    """Of 50 tokens, forward and backward."""
    monkeypatch.setattr("dpo_service.specs.room.CHUNK_BYTES", 4 * (5 * 13 + 1))
    monkeypatch.setattr("dpo_service.specs.room.MIN_CHUNK", 2)
    hidden_CH = torch.randn(50, 4, requires_grad=True)
    with Logits() as made:
        head_logps(Head(kind(4, 13)), hidden_CH, torch.arange(50) % 13)[0].sum().backward()
    assert made.most == 5


class Products(TorchDispatchMode):
    """Counts those that make logits [rows, 13]."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and out.shape[1] == 13
        return out


@pytest.mark.parametrize(("room", "products"), [(0, 6), (4 * 13, 5), (4 * 13 * 2 + 1, 4), (2**25, 3)])
@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_what_is_kept_spares_products_and_changes_no_bit(monkeypatch, kind, room, products):
    """Eleven tokens by four, `room` logits kept: each of three chunks is made once, and again if it was not kept."""
    head, hidden_CH, target_C = make(kind == "scaled", 0.25 if kind == "scaled" else 1.0, None)
    inputs = [hidden_CH, *head.module.parameters()]
    monkeypatch.setattr("dpo_service.train.head.KEPT_LOGITS", 0)
    expected = torch.autograd.grad(head_logps(head, hidden_CH, target_C, 4)[0].square().sum(), inputs)
    monkeypatch.setattr("dpo_service.train.head.KEPT_LOGITS", room)
    with Products() as made:
        loss = head_logps(head, hidden_CH, target_C, 4)[0].square().sum()
        found = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert made.count == products
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    again = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_in_bfloat16_a_logit_takes_six_bytes_and_none_is_kept(monkeypatch):
    """Fifty tokens by five: ten chunks, and again each in the backward pass."""
    monkeypatch.setattr("dpo_service.specs.room.CHUNK_BYTES", 6 * (5 * 13 + 1))
    monkeypatch.setattr("dpo_service.specs.room.MIN_CHUNK", 2)
    hidden_CH = torch.randn(50, 4, dtype=torch.bfloat16, requires_grad=True)
    head = Head(nn.Linear(4, 13, dtype=torch.bfloat16))
    with Products() as made:
        head_logps(head, hidden_CH, torch.arange(50) % 13)[0].sum().backward()
    assert made.count == 20


class Places(TorchDispatchMode):
    """Where products [rows, 13] lie, all of them held on to."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket is torch.ops.aten.mm and out.shape[1] == 13:
            self.made.append(out)
        return out


def test_in_bfloat16_chunks_lie_where_the_one_before_lay():
    """Three chunks forward, three backward."""
    head, hidden_CH, target_C = make(False, 1.0, None, dtype=torch.bfloat16)
    with Places() as places:
        head_logps(head, hidden_CH, target_C, 4)[0].sum().backward()
    assert len(places.made) == 6
    assert len({out.data_ptr() for out in places.made}) == 2


class Alive(TorchDispatchMode):
    """The most logits [rows, 13] of earlier chunks that were there when a product was made."""

    most = 0

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket is torch.ops.aten.mm and out.shape[1] == 13:
            self.most = max(self.most, sum(earlier() is not None for earlier in self.made))
            self.made.append(weakref.ref(out))
        return out


@pytest.mark.parametrize(("grad", "earlier"), [(True, 2), (False, 0)])
def test_nothing_is_kept_where_no_backward_pass_follows(grad, earlier):
    """Eleven tokens by four."""
    head, hidden_CH, target_C = make(False, 1.0, None)
    with torch.set_grad_enabled(grad), Alive() as alive:
        head_logps(head, hidden_CH, target_C, 4)
    assert alive.most == earlier


@pytest.mark.parametrize("frozen", [True, False])
def test_a_head_that_is_more_than_a_matrix_gives_the_same(frozen):
    """A subclass takes the checkpointed way."""

    class Other(nn.Linear):
        pass

    head, hidden_CH, target_C = make(True, 0.5, None)
    head.module.requires_grad_(not frozen)
    other = Other(6, 13, dtype=torch.float64).requires_grad_(not frozen)
    other.load_state_dict(head.module.state_dict())
    results = [head_logps(Head(module, 0.5), hidden_CH, target_C, 4)[0] for module in (head.module, other)]
    assert torch.allclose(*results, rtol=1e-12)
    gradients = [torch.autograd.grad(result.sum(), hidden_CH)[0] for result in results]
    assert torch.allclose(*gradients, rtol=1e-10)


def test_large_logits_do_not_overflow():
    head, hidden_CH, target_C = make(False, 1.0, None, torch.float32)
    logps_C = head_logps(head, hidden_CH * 1e5, target_C).logps_C
    logps_C.sum().backward()
    assert torch.isfinite(logps_C).all()
    assert torch.isfinite(head.module.weight.grad).all()


def test_bfloat16_keeps_float32_sums():
    head, hidden_CH, target_C = make(True, 1.0, None, torch.float32, tokens=64, vocabulary=500, hidden=32)
    with torch.autocast("cpu", torch.bfloat16):
        logps_C = head_logps(head, hidden_CH, target_C, 16).logps_C
    logps_C.sum().backward()
    assert logps_C.dtype == head.module.weight.grad.dtype == hidden_CH.grad.dtype == torch.float32
    found, expected_C = head.module.weight.grad.clone(), whole(head, hidden_CH, target_C)
    assert torch.allclose(logps_C, expected_C, atol=0.03)
    expected = torch.autograd.grad(expected_C.sum(), head.module.weight)[0]
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_only_what_is_asked_for_gets_a_gradient():
    head, hidden_CH, target_C = make(True, 1.0, None)
    head.module.weight.requires_grad_(False)
    head_logps(head, hidden_CH, target_C)[0].sum().backward()
    assert head.module.weight.grad is None
    assert head.module.bias.grad is not None
    assert hidden_CH.grad is not None


def test_first_choices():
    head, hidden_CH, _ = make(False, 1.0, None)
    best_C = head.module(hidden_CH).argmax(1)
    other_C = (best_C + 1) % 13
    assert head_logps(head, hidden_CH, best_C)[1].all()
    assert not head_logps(head, hidden_CH, other_C)[1].any()


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2"])
def test_families_are_split_and_equal_their_own_logits(name):
    """Tied weights (llama), scaled logits (granite), soft-capped ones (gemma2)."""
    model, batch = family(name, (PACKED | PADDED)[name]), collate(random_pairs(3))
    assert split_head(model) is not None
    unsplit = copy.deepcopy(model)
    unsplit._dpo_split_head = None
    results = []
    for one in (model, unsplit):
        logps_S = completion_logps(one, batch, chunk=7).logps_S
        logps_S.sum().backward()
        results.append((logps_S, [p.grad for p in one.parameters()]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1.0)
