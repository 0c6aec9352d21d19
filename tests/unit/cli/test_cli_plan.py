"""`dpo plan`, on this machine and through a service."""

import json

import pytest

from dpo_service.cli.app import run
from dpo_service.cli.exits import ExitCode
from dpo_service.jobs import admit
from tests.models import save_no_weights, save_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def model(tmp_path, monkeypatch):
    """An 8B one without its weights, which only the inspection would miss."""
    monkeypatch.setattr(admit, "inspect_model", lambda request: None)
    directory = tmp_path / "model"
    save_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_no_weights(directory)
    return str(directory)


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": "yes " * n, "rejected": "no"} for n in range(1, 40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_job_that_fits_is_shown_with_its_parts_and_hours(model, pairs, capsys):
    assert run(["plan", pairs, "--model", model, "--gpu", "B200"]) == ExitCode.OK
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("8.03B parameters", "on 1 x B200", "optimizer", "fits in", "GPU-hours", "A100-40 no"):
        assert text in shown, text


def test_one_that_does_not_fit_is_refused_with_what_would(model, pairs, capsys):
    assert run(["plan", pairs, "--model", model, "--gpu", "H100-80", "--json"]) == ExitCode.REFUSED
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["fixes"]
    assert run(["plan", pairs, "--model", model, "--gpu", "H100-80"]) == ExitCode.REFUSED
    shown = " ".join(capsys.readouterr().out.split())
    assert "does not fit" in shown
    assert "it fits if you train a LoRA adapter" in shown
    settings = ["--set", "lora.rank=16"]
    assert run(["plan", pairs, "--model", model, "--gpu", "H100-80", *settings]) == ExitCode.OK


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["sampling.samplers=2"], "sampling takes 2 more GPUs."),
        (["sampling.gpus_per_sampler=0"], "sampling takes 1 more CPU."),
        (
            ["sampling.shares_device=true", "resources.gpus_per_worker=1"],
            "asleep it keeps its CUDA context and graphs",
        ),
    ],
)
def test_of_a_job_that_samples_it_says_that_samplers_are_not_counted(model, pairs, settings, said, capsys):
    rules = ["judge.kind=rules", 'judge.rules=[{"rule": "finished"}]']
    asked = [part for one in [*rules, *settings] for part in ("--set", one)]
    assert run(["plan", pairs, "--model", model, "--gpu", "B200", "--method", "online", *asked]) in (0, 3)
    shown = " ".join(capsys.readouterr().out.split())
    assert "This counts the trainer alone, and of a step neither sampling nor judging" in shown
    assert said in shown


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--gpu", "V100"], "H100-80"),
        (["--model", "no/where/at/all"], "--url"),
        (["--set", "max_length=9000"], "8,192"),
        (["--set", "learning_rates=1"], "did you mean `learning_rate`?"),
        (["--set", "beta=3"], "less than or equal to 2"),
    ],
)
def test_what_a_service_would_refuse_is_refused_here(model, pairs, changed, said, capsys):
    assert run(["plan", pairs, "--model", model, *changed]) == ExitCode.REFUSED
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_a_family_without_a_formula_is_planned_by_the_model_itself(family, pairs, tmp_path, monkeypatch, capsys):
    """By the report that the inspection's process would give."""
    from dpo_service.inspection.inspect import inspect
    from dpo_service.specs.adapter import LoraSpec
    from dpo_service.train.optim import trained_parameters
    from dpo_service.train.policy import add_adapter, load_model
    from tests.unit.train.composites import save_composite
    from tests.unit.train.families import EVERY
    from tests.unit.train.families import family as make
    from tests.unit.train.training_kit import build_model

    directory = build_model(tmp_path / "model")
    if family == "gemma3":
        save_composite(family, directory)
    else:
        make(family, EVERY[family] | {"vocab_size": 300}).save_pretrained(directory)
    monkeypatch.setattr(admit, "inspect_model", inspect)
    settings = ["--set", "lora.rank=4", "--json"]
    assert run(["plan", pairs, "--model", str(directory), "--gpu", "L4", *settings]) == ExitCode.OK
    adapted = json.loads(capsys.readouterr().out)["plan"]
    assert run(["plan", pairs, "--model", str(directory), "--gpu", "L4", "--json"]) == ExitCode.OK
    whole = json.loads(capsys.readouterr().out)["plan"]
    model = load_model(directory)
    assert whole["parameters"] == adapted["parameters"] == model.num_parameters()
    assert whole["trained_parameters"] == sum(p.numel() for p in trained_parameters(model).values())
    trained = trained_parameters(add_adapter(model, LoraSpec(rank=4), 0))
    assert adapted["trained_parameters"] == sum(p.numel() for p in trained.values())
