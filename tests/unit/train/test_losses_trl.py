"""Our losses beside TRL 1.16's own code, on random log-probabilities."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dpo_service.specs.loss import LossSpec, mixed
from dpo_service.train.losses import LossInputs, pair_weights, row_losses

PAIRS, LENGTH = 16, 12
CASES = [
    ("sigmoid", "sigmoid", {"beta": 0.3}),
    ("robust", "robust", {"beta": 0.3, "label_smoothing": 0.2}),
    ("hinge", "hinge", {"beta": 0.3}),
    ("ipo", "ipo", {"beta": 0.3}),
    ("sigmoid_norm", "sigmoid_norm", {"beta": 5.0}),
    ("exo_pair", "exo_pair", {"beta": 0.3, "label_smoothing": 0.05}),
    ("nca_pair", "nca_pair", {"beta": 0.3}),
    ("bco_pair", "bco_pair", {"beta": 0.3}),
    ("apo_zero", "apo_zero", {"beta": 0.3}),
    ("apo_down", "apo_down", {"beta": 0.3}),
    ("discopop", "discopop", {"beta": 0.3, "discopop_tau": 0.05}),
    ("sppo", "sppo_hard", {"beta": 0.3}),
    ("sigmoid", "sigmoid", {"beta": 0.3, "ld_alpha": 0.4}),
    ("apo_zero", "apo_zero", {"beta": 0.3, "ld_alpha": 0.0}),
    ("sigmoid", "sigmoid", {"beta": 0.3, "wpo": True}),
    ("ipo", "ipo", {"beta": 0.3, "wpo": True}),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Batch:
    """Log-probabilities of [2P, LENGTH] completion tokens, chosen sequences first, after a prompt of one token."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens_S = torch.randint(1, LENGTH + 1, (2 * PAIRS,), generator=generator)
        self.mask_SL = torch.arange(LENGTH) < self.tokens_S[:, None]
        self.logps_SL = -torch.rand(2 * PAIRS, LENGTH, generator=generator) * 3 * self.mask_SL
        self.squares_SL = -torch.rand(2 * PAIRS, LENGTH, generator=generator) * self.mask_SL
        self.reference_S = self.logps_S + torch.randn(2 * PAIRS, generator=generator) * 4

    @property
    def logps_S(self) -> torch.Tensor:
        return self.logps_SL.sum(dim=1)

    def ours(self) -> LossInputs:
        (chosen, rejected), (n_chosen, n_rejected) = self.logps_S.chunk(2), self.tokens_S.chunk(2)
        shared_S = torch.minimum(n_chosen, n_rejected).repeat(2)
        tails_S = (self.logps_SL * (torch.arange(LENGTH) >= shared_S[:, None])).sum(dim=1)
        aligned_S = self.logps_S - self.squares_SL.sum(dim=1)
        return LossInputs(
            chosen,
            n_chosen,
            rejected,
            n_rejected,
            *self.reference_S.chunk(2),
            *tails_S.chunk(2),
            weight_P=pair_weights(aligned_S, self.tokens_S),
        )

    def theirs(self) -> dict[str, torch.Tensor]:
        completion_SL = torch.cat([torch.zeros(2 * PAIRS, 1), self.mask_SL], dim=1).long()
        chosen, rejected = self.reference_S.chunk(2)
        return {
            "input_ids": completion_SL,
            "attention_mask": torch.ones_like(completion_SL),
            "completion_mask": completion_SL,
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }


class Model:
    """Says what TRL's patched model says of a batch."""

    training = True

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __call__(self, **_: object) -> SimpleNamespace:
        zeros_SL = torch.zeros_like(self._batch.logps_SL)
        return SimpleNamespace(
            log_probs=self._batch.logps_SL,
            log_sum_sq_probs=self._batch.squares_SL,
            entropy=zeros_SL,
            mean_logits=zeros_SL,
            is_top1=zeros_SL.bool(),
        )


def trl_loss(batch: Batch, loss_type: str | list[str], spec: LossSpec, weights: list[float] | None = None) -> float:
    """DPOTrainer._compute_loss, with as much of a trainer as it reads."""
    from trl import DPOTrainer

    model = Model(batch)
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=model,
        accelerator=accelerator,
        args=SimpleNamespace(discopop_tau=spec.discopop_tau),
        loss_types=[loss_type] if isinstance(loss_type, str) else loss_type,
        loss_weights=weights or [1.0],
        beta=spec.beta,
        label_smoothing=spec.label_smoothing,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        ld_alpha=None if spec.ld_alpha == 1 else spec.ld_alpha,
        use_weighting=spec.wpo,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    return float(DPOTrainer._compute_loss(trainer, model, batch.theirs(), False))


@pytest.mark.parametrize(("name", "loss_type", "numbers"), CASES, ids=str)
def test_equals_trl(name, loss_type, numbers):
    spec = LossSpec(name=name, **numbers)
    for seed in range(5):
        batch = Batch(seed)
        factor = 2 if name == "sppo" else 1  # TRL leaves out the paper's 1/2
        ours = factor * row_losses(batch.ours(), spec).mean().item()
        assert ours == pytest.approx(trl_loss(batch, loss_type, spec), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("losses", "numbers"),
    [
        ({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, {"beta": 0.3}),
        ({"hinge": 1.0, "exo_pair": 2.5}, {"beta": 0.2, "label_smoothing": 0.05}),
        ({"robust": 0.5, "apo_zero": 0.25}, {"beta": 0.2, "label_smoothing": 0.05, "wpo": True}),
    ],
    ids=str,
)
def test_a_mix_equals_trl(losses, numbers):
    """Chosen answers of one length: TRL averages the likelihood over the batch's tokens, we over each answer's."""
    spec = mixed(losses, numbers)
    for seed in range(5):
        batch = Batch(seed)
        batch.tokens_S[:PAIRS] = 6
        batch.mask_SL = torch.arange(LENGTH) < batch.tokens_S[:, None]
        batch.logps_SL = torch.where(batch.mask_SL, batch.logps_SL - 0.1, 0)
        batch.squares_SL = batch.squares_SL * batch.mask_SL
        theirs = trl_loss(batch, list(losses), spec, list(losses.values()))
        assert row_losses(batch.ours(), spec).mean().item() == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def trl_kto(batch: Batch, labels: torch.Tensor, kl_S: torch.Tensor, spec: LossSpec) -> float:
    """KTOTrainer._compute_loss; `kl_S` are log-ratios of the mismatched answers."""
    from trl import KTOTrainer

    rows = {name: tensor[:PAIRS] for name, tensor in batch.theirs().items() if "logps" not in name}
    model = Model(batch)
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=model,
        accelerator=accelerator,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=spec.beta,
        desirable_weight=spec.desirable_weight,
        undesirable_weight=spec.undesirable_weight,
        aux_loss_enabled=False,
        _compute_kl_logps=lambda *_: kl_S,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    rows |= {"label": labels, "ref_logps": batch.reference_S[:PAIRS], "ref_KL_logps": torch.zeros_like(kl_S)}
    return float(KTOTrainer._compute_loss(trainer, model, rows, False))


@pytest.mark.parametrize("drift", [-1.0, 2.0])
def test_kto_equals_trl(drift):
    spec = LossSpec(name="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    for seed in range(5):
        batch = Batch(seed)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.rand(PAIRS, generator=generator) > 0.4
        kl_S = torch.randn(PAIRS, generator=generator) + drift
        pairs = batch.ours()
        inputs = LossInputs(
            pairs.chosen_P,
            pairs.chosen_tokens_P,
            ref_chosen_P=pairs.ref_chosen_P,
            label_P=labels.float(),
            baseline=max(0.0, float(kl_S.mean())),
        )
        batch.logps_SL, batch.squares_SL = batch.logps_SL[:PAIRS], batch.squares_SL[:PAIRS]
        assert row_losses(inputs, spec).mean().item() == pytest.approx(trl_kto(batch, labels, kl_S, spec), rel=1e-6)


@pytest.mark.parametrize("gamma_beta_ratio", [0.0, 0.4])
def test_simpo_equals_trl(gamma_beta_ratio):
    from trl.experimental.cpo import CPOTrainer

    batch, beta = Batch(0), 2.5
    trainer = SimpleNamespace(
        beta=beta,
        loss_type="simpo",
        simpo_gamma=gamma_beta_ratio * beta,
        label_smoothing=0.0,
        cpo_alpha=0.0,
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs_P, *_ = CPOTrainer.cpo_loss(trainer, *(batch.logps_S / batch.tokens_S).chunk(2))
    spec = LossSpec(name="simpo", beta=beta, gamma_beta_ratio=gamma_beta_ratio)
    assert torch.allclose(row_losses(batch.ours(), spec), theirs_P, rtol=1e-6, atol=1e-6)


def test_orpo_equals_trl():
    """TRL's odds-ratio term; its likelihood term runs over prompt and answer, ours and the paper's over the answer."""
    from trl.experimental.orpo import ORPOTrainer

    batch = Batch(0)
    trainer = SimpleNamespace(beta=0.7, accelerator=SimpleNamespace(device="cpu"))
    chosen_P, rejected_P = (batch.logps_S / batch.tokens_S).chunk(2)
    term_P, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen_P, rejected_P)
    ours_P = row_losses(batch.ours(), LossSpec(name="orpo", lam=0.7))
    assert torch.allclose(ours_P, -chosen_P - term_P, rtol=1e-6, atol=1e-6)
