"""Of a model that reads images beside text the language model is trained, and the rest is published as it is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from dpo_service.errors import ModelNotFound, TrainingError
from dpo_service.inspection.inspect import inspect
from dpo_service.manifests.inspection import InspectionRequest
from dpo_service.planning.shape import read_shape
from dpo_service.registry import directories
from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.optim import OptimSpec
from dpo_service.train.batch import collate
from dpo_service.train.language import is_composite, language_modules, outside
from dpo_service.train.layers import decoder_layers
from dpo_service.train.logprobs import completion_logps, packed, packs, split_head
from dpo_service.train.optim import build_optimizer, trained_parameters
from dpo_service.train.policy import add_adapter, base_of, described_model, empty_model, load_model
from dpo_service.train.probe import verify_published
from tests.unit.train.composites import COMPOSITES, PALIGEMMA, save_composite
from tests.unit.train.families import PACKED, family
from tests.unit.train.test_attention import random_pairs
from tests.unit.train.training_kit import build_model, make_job

PADDED = ("qwen3_5", "llama4")
"""Whose language models are computed padded: linear and chunked attention."""


@pytest.fixture(scope="module", params=COMPOSITES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def directory(name, tmp_path_factory):
    return save_composite(name, tmp_path_factory.mktemp(name))


def plain_logps(directory, examples):
    """By the whole model as transformers loads it, a sequence at a time."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for answer in ("chosen", "rejected"):
        for example in examples:
            ids = torch.tensor([[*example.prompt, *getattr(example, answer)]])
            with torch.no_grad():
                logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            start = len(example.prompt) - 1
            found.append(logps[start:].gather(1, ids[0, start + 1 :, None]).sum())
    return torch.stack(found)


def test_log_probabilities_are_those_of_the_whole_model(name, directory):
    model, examples = load_model(directory), random_pairs(4)
    assert packs(model) is packed(model, collate(examples)) is (name not in PADDED)
    assert split_head(model) is not None
    logps_S = completion_logps(model, collate(examples)).logps_S
    assert torch.allclose(logps_S, plain_logps(directory, examples), rtol=1e-5, atol=1e-5)


def test_the_model_is_of_one_class_however_it_is_opened(directory):
    kinds = {type(opened(directory)) for opened in (load_model, described_model, empty_model)}
    assert kinds == {type(AutoModelForImageTextToText.from_pretrained(directory))}


def test_every_weight_is_either_language_or_frozen(directory):
    model = load_model(directory)
    assert is_composite(model)
    foreign = tuple(f"{path}." for path in outside(model))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not name.startswith(foreign), name
    optimizer = build_optimizer(model, OptimSpec(learning_rate=1e-3, weight_decay=0.1))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trained_parameters(model).values()}
    assert set(decoder_layers(model)) <= set(language_modules(model))


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=2)], ids=["whole", "adapter"])
def test_what_is_published_is_the_whole_model_with_its_language_trained(name, directory, tmp_path, lora):
    job = make_job(tmp_path, directory, reference="live", rows=8, batch_size=8, steps=2, validation=0, lora=lora)
    job.train()
    published = tmp_path / "jobs" / "j" / "checkpoints"
    model_dir = max(path.parent for path in published.rglob("config.json") if path.parent.name == "model")
    before, after = load_file(directory / "model.safetensors"), load_file(model_dir / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {key for key, weight in before.items() if not torch.equal(weight, after[key])}
    assert changed
    parts = ("vision", "visual", "projector", "connector", "aligner")
    assert not [key for key in changed if any(part in key for part in parts)]
    kept, given = (json.loads((d / "config.json").read_text()) for d in (model_dir, directory))
    assert (kept["architectures"], kept["vision_config"]) == (given["architectures"], given["vision_config"])
    for file in ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"):
        assert (model_dir / file).read_bytes() == (directory / file).read_bytes()
    assert "give the policy's log-probabilities" in verify_published(model_dir)
    examples = random_pairs(2)
    assert torch.allclose(
        completion_logps(load_model(model_dir), collate(examples)).logps_S,
        plain_logps(model_dir, examples), rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_adapters_are_on_the_language_model_alone(directory):
    model = add_adapter(load_model(directory), LoraSpec(rank=2), 0)
    adapted = {name for name, p in base_of(model).named_parameters() if p.requires_grad}
    assert adapted
    assert not [name for name in adapted if name.startswith(tuple(outside(base_of(model))))]
    report = inspect(InspectionRequest(directory=str(directory), lora=LoraSpec(rank=2), sized=True))
    assert not report.faults
    (note,) = report.notes  # on how many layers; images are no matter of positions
    assert note.startswith("The adapter of rank 2")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.size.adapter.parameters == trained


def test_a_plan_counts_the_whole_model_and_what_is_trained_of_it(directory):
    model = load_model(directory)
    trained = sum(p.numel() for p in trained_parameters(model).values())
    size = inspect(InspectionRequest(directory=str(directory), sized=True)).size
    for shape in (read_shape(directory, "m", size), read_shape(directory, "m")):
        assert shape.parameters == model.num_parameters()
        assert shape.parameters - shape.frozen == trained


def test_its_limits_are_those_of_its_language_model(name, directory):
    facts = directories.inspect(directory, "m")
    assert facts.architecture.endswith("ForConditionalGeneration")
    assert (facts.max_length, facts.vocab_size, facts.layer_width) == (256, 300, 64)


def test_a_prompt_that_is_attended_to_both_ways_is_refused(tmp_path):
    directory = save_composite("paligemma", tmp_path / "m", PALIGEMMA)
    with pytest.raises(TrainingError, match="PaliGemmaForConditionalGeneration"):
        load_model(directory)


def test_what_has_no_language_model_is_refused_by_its_class(tmp_path):
    build_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def architecture(name, **more):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [name]} | more))
        return tmp_path

    with pytest.raises(ModelNotFound, match="sequence-to-sequence"):
        directories.inspect(architecture("T5ForConditionalGeneration", is_encoder_decoder=True), "m")
    with pytest.raises(ModelNotFound, match="names SomeForConditionalGeneration; a causal language model"):
        directories.inspect(architecture("SomeForConditionalGeneration"), "m")
    AutoConfig.for_model("clip").save_pretrained(tmp_path)
    architecture("CLIPModel", **AutoConfig.for_model("clip").to_dict())
    (fault,) = inspect(InspectionRequest(directory=str(tmp_path), weights_here=False)).faults
    assert "is no causal language model, and has none within" in fault.message


def test_a_missing_library_is_named(tmp_path):
    """Gemma 3n's vision tower is timm's."""
    AutoConfig.for_model("gemma3n").save_pretrained(tmp_path)
    pytest.importorskip("transformers")
    try:
        import timm  # noqa: F401
    except ImportError:
        (fault,) = inspect(InspectionRequest(directory=str(tmp_path), weights_here=False)).faults
        assert "timm" in fault.message
        assert "install it" in fault.message


def test_a_causal_model_is_trained_whole():
    model = family("llama", PACKED["llama"])
    assert not is_composite(model)
    assert outside(model) == []
    assert language_modules(model) == list(model.modules())
