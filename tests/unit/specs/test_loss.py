"""Which loss takes which number: what a user may write, and that none of it is ignored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from dpo_service.cli.jobfile import HYPERPARAMETERS
from dpo_service.jobs import choices
from dpo_service.specs.job import JobSpec
from dpo_service.specs.loss import LOSS_TABLE, DpoLoss, LossSpec
from dpo_service.specs.method import METHODS, MethodSpec, SupervisedHyperparameters
from dpo_service.train.losses import LossInputs, row_losses

LOSSES = {name: ("dpo", {"loss": name}) for name in get_args(DpoLoss)} | {
    method: (method, {}) for method in ("ipo", "orpo", "simpo", "kto")
}
OPTIONS: dict[str, tuple[Any, Any]] = {
    "beta": (0.2, 0.4),
    "label_smoothing": (0.1, 0.2),
    "discopop_tau": (0.1, 0.2),
    "length_penalty": (0.1, 0.2),
    "rpo_alpha": (0.1, 0.2),
    "wpo": (True, False),
    "ld_alpha": (0.1, 0.2),
    "length_normalize": (True, False),
    "lam": (0.1, 0.2),
    "gamma_beta_ratio": (0.1, 0.2),
    "desirable_weight": (0.5, 2.0),
    "undesirable_weight": (0.5, 2.0),
}
ROWS = torch.tensor([[-9.0, -7.0], [-8.0, -6.0], [-8.5, -8.0], [-7.0, -6.5]], dtype=torch.float64)
TAILS = torch.tensor([[0.0, -3.0], [-4.0, 0.0]], dtype=torch.float64)
INPUTS = LossInputs(
    ROWS[0],
    torch.tensor([3, 5]),
    ROWS[1],
    torch.tensor([7, 2]),
    ROWS[2],
    ROWS[3],
    *TAILS,
    weight_P=ROWS[0].exp(),
    label_P=torch.tensor([1.0, 0.0]),
)


def job(method: str, hyperparameters: dict[str, Any], **fields: Any) -> JobSpec:
    document = {"model": "base", "training_file": "f", "method": {"type": method}, **fields}
    document["method"][method] = {"hyperparameters": hyperparameters}
    return JobSpec.model_validate(document)


def loss_of(spec: JobSpec) -> LossSpec:
    return choices._loss(spec)


def test_the_options_are_all_there_are():
    assert set(OPTIONS) == LossSpec.model_fields.keys() - {"name", "weight", "others"}
    assert set(OPTIONS) == {option for row in LOSS_TABLE.values() for option in row.options}
    assert set(LOSSES) == set(LOSS_TABLE) - {"sft"}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_an_option_is_used_or_refused(loss, option):
    method, chosen = LOSSES[loss]
    if option in LOSS_TABLE[loss].options:
        one, other = (row_losses(INPUTS, loss_of(job(method, chosen | {option: v}))) for v in OPTIONS[option])
        assert (one != other).any() if loss == "kto" else (one != other).all()
        return
    for value in OPTIONS[option]:
        with pytest.raises(ValidationError) as refused:
            job(method, chosen | {option: value})
        assert {error["loc"] for error in refused.value.errors()} == {("method", method, "hyperparameters", option)}
    with pytest.raises(ValidationError, match=option):
        LossSpec(name=loss, **{option: OPTIONS[option][0]})


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", ["cached", "live"])
def test_a_reference_is_used_or_refused(loss, mode):
    method, chosen = LOSSES[loss]
    assert LOSS_TABLE[loss].reference == (METHODS[method].reference == "initial")
    if LOSS_TABLE[loss].reference:
        assert choices._reference(job(method, chosen, reference=mode)) == mode
        moved = replace(INPUTS, ref_chosen_P=ROWS[2] + 1)
        assert (row_losses(moved, LossSpec(name=loss)) != row_losses(INPUTS, LossSpec(name=loss))).all()
        return
    with pytest.raises(ValidationError, match="no reference; remove `reference`"):
        job(method, chosen, reference=mode)
    assert choices._reference(job(method, chosen)) == "none"


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_left_open_is_the_authors_default(loss):
    method, chosen = LOSSES[loss]
    spec = job(method, chosen | dict.fromkeys(("batch_size", "n_epochs"), "auto"))
    assert loss_of(spec).model_dump() == {"name": loss, **LOSS_TABLE[loss].options}
    assert choices._optim(spec).learning_rate == LOSS_TABLE[loss].learning_rate
    assert LossSpec.model_validate_json(loss_of(spec).model_dump_json()) == loss_of(spec)


@pytest.mark.parametrize(
    ("method", "chosen", "says"),
    [
        ("dpo", {"loss": "sigmiod"}, "sigmoid"),
        ("dpo", {"loss": "ipo"}, "sigmoid"),
        ("dpo", {"loss": "hinge", "beta": 3}, "less than or equal to 2"),
        ("dpo", {"loss": "sigmoid_norm", "beta": 101}, "less than or equal to 100"),
        ("dpo", {"loss": "exo_pair", "label_smoothing": 0}, "greater than 0"),
        ("dpo", {"loss": "robust", "label_smoothing": 0.5}, "less than 0.5"),
        ("dpo", {"loss": "discopop", "discopop_tau": 1}, "less than 1"),
        ("dpo", {"loss": "apo_down", "rpo_alpha": 1}, "has no rpo_alpha; remove it, or use loss 'sigmoid'"),
        ("dpo", {"rpo_alpha": -1}, "greater than or equal to 0"),
        ("ipo", {"label_smoothing": 0.1}, "label_smoothing"),
        ("ipo", {"loss": "sigmoid"}, "loss"),
        ("orpo", {"beta": 0.1}, "beta"),
        ("simpo", {"gamma_beta_ratio": 3}, "less than or equal to 2"),
        ("dpo", {"losses": {"sigmoid": 1.0}}, "two losses or more"),
        ("dpo", {"losses": {"sft": 1.0}}, "two losses or more"),
        ("dpo", {"losses": {"sigmoid": 1.0, "ipo": 1.0}}, "losses"),
        ("dpo", {"losses": {"sigmoid": 1.0, "hinge": 0}}, "greater than 0"),
        ("dpo", {"losses": {"apo_down": 1.0, "sft": 1.0}}, "remove one"),
        ("dpo", {"loss": "hinge", "losses": {"sigmoid": 1.0, "sft": 1.0}}, "exclude each other"),
        ("dpo", {"loss": None}, "give one of them"),
        ("dpo", {"loss": None, "beta": 0.2}, "give one of them"),
        ("dpo", {"losses": {"sigmoid": 1.0, "sft": 1.0}, "rpo_alpha": 1.0}, "give one of the two"),
        ("dpo", {"losses": {"sigmoid": 1.0, "hinge": 1.0}, "discopop_tau": 0.1}, "has no discopop_tau"),
        ("dpo", {"losses": {"sigmoid": 1.0, "sigmoid_norm": 1.0}, "ld_alpha": 0.5}, "'sigmoid_norm' has no ld_alpha"),
        ("dpo", {"losses": {"sigmoid": 1.0, "sigmoid_norm": 1.0}, "beta": 5}, "less than or equal to 2"),
        ("kto", {"batch_size": 1}, "greater than or equal to 2"),
        ("kto", {"desirable_weight": 0}, "greater than 0"),
        ("kto", {"rpo_alpha": 0.1}, "rpo_alpha"),
    ],
)
def test_numbers_that_cannot_work_are_refused_by_name(method, chosen, says):
    with pytest.raises(ValidationError, match=says):
        job(method, chosen)


def test_a_stored_mix_is_read_as_it_was():
    spec = job("dpo", {"losses": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, "beta": 0.3})
    again = JobSpec.model_validate(spec.model_dump(mode="json"))
    assert loss_of(again) == loss_of(spec)
    assert [(part.name, part.weight, part.beta) for part in loss_of(spec).parts] == [
        ("sigmoid", 0.8, 0.3),
        ("bco_pair", 0.2, 0.3),
    ]
    assert (loss_of(spec).rpo_alpha, choices._optim(spec).learning_rate) == (1.0, LOSS_TABLE["sigmoid"].learning_rate)


def test_an_option_that_is_left_to_the_service_is_no_option():
    spec = job("dpo", {"loss": "hinge", "label_smoothing": "auto", "beta": "auto"})
    assert loss_of(spec).model_dump() == {"name": "hinge", **LOSS_TABLE["hinge"].options}


def test_runs_stored_by_the_first_release_are_read():
    assert LossSpec.model_validate({"name": "sft", "beta": 0.1, "label_smoothing": 0.0}) == LossSpec(name="sft")
    stored = LossSpec.model_validate({"name": "sigmoid", "beta": 0.3, "label_smoothing": 0.1})
    assert (stored.beta, stored.label_smoothing, stored.rpo_alpha) == (0.3, 0.1, 0.0)


def test_the_command_line_knows_every_hyperparameter():
    known: set[str] = set()
    for method in METHODS:
        asked = MethodSpec.model_validate({"type": method}).hyperparameters
        assert isinstance(asked, SupervisedHyperparameters)
        known |= type(asked).model_fields.keys()
    assert set(HYPERPARAMETERS) == known
