"""The model that is trained: loading it, its adapter, and writing it out as others load it."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_service.errors import TrainingError
from dpo_service.rows.backend import class_of, read_json
from dpo_service.specs.adapter import LoraSpec
from dpo_service.train.adapters import excluded, target_modules
from dpo_service.train.language import loader_of, require_language
from dpo_service.train.logprobs import split_head, use_packing
from dpo_service.train.pretrained import read
from dpo_service.train.products import use_fast_products

COPIED = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "processor_config.json",
    "*preprocessor_config.json",
)
"""What of a base model's directory its descendants keep: the tokenizer, its templates, how to generate, how images and
sound are read."""


_ADAPTERS_OR_SCALES = re.compile(r"\.lora_|\.weight\.")
"""Of a state: what an adapter adds, and what bitsandbytes keeps beside a weight of 4 bits."""
WEIGHT_DTYPE = {"float32": torch.float32, "bfloat16": torch.float32, "pure_bfloat16": torch.bfloat16}
"""What the weights are kept in while training; adapters are float32 always."""


def load_model(
    path: Path, device: torch.device | str = "cpu", precision: str = "float32", *, quantize: str = "none"
) -> Any:
    """A causal language model in the weights' type of `precision`, without dropout, read straight onto `device`.
    Safetensors only; no code from the model is run. `quantize` as in LoraSpec: linear layers but the head in 4 bits.

    Raises:
        TrainingError: transformers has no model of this kind of its own, or it is no causal language model.
        ModelRefused: as `pretrained.read`.
    """
    model = plain_model(
        path,
        dtype=WEIGHT_DTYPE[precision],
        device=device,
        quantization_config=_four_bits(precision) if quantize == "nf4" else None,
    )
    use_fast_products(model)
    split_head(model)
    use_packing(model)
    return model


def described_model(path: Path) -> Any:
    """The model of `load_model` on the meta device. Its weight files' headers are read, and no weight.

    Raises:
        TrainingError, ModelRefused: as `load_model`.
    """
    return plain_model(path, dtype=torch.float32, device="meta")


def empty_model(path: Path) -> Any:
    """The model of `load_model` on the meta device: its modules, names and shapes, without weights.

    Raises:
        TrainingError: as `load_model`.
    """
    config = _config(path)
    loader = loader_of(config)
    with torch.device("meta"), _needing(config):
        return require_language(loader.from_config(config, trust_remote_code=False).eval())


def plain_model(path: Path, **options: Any) -> Any:
    """The model in `path` as transformers computes it, of the class it was saved from; what is not its language model
    is frozen. `options` and errors as `pretrained.read`."""
    config = _config(path)
    loader = loader_of(config)
    with _needing(config):
        return require_language(read(loader, path, **options))


@contextmanager
def _needing(config: Any) -> Iterator[None]:
    """What a family needs beside transformers is named, and not where it was missed."""
    try:
        yield
    except ImportError as error:
        what = ", ".join(config.architectures or ()) or config.model_type
        raise TrainingError(
            f"{what} needs a library that is not installed ({str(error).strip().splitlines()[0]}); install it, or give "
            "another model"
        ) from error


def _config(path: Path) -> Any:
    """The model's configuration. A model that brings its own code is refused by what is wrong, not by where it
    fails."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise TrainingError(
            f"the model's architecture is not one of transformers' own ({str(error).splitlines()[0]}); code that a "
            "model brings is never run: use a model of a known architecture"
        ) from error
    return config


def _four_bits(precision: str) -> Any:
    """Normal floats of 4 bits, their scales quantised too (arXiv:2305.14314, section 3)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if precision == "float32" else torch.bfloat16,
    )


def add_adapter(model: Any, spec: LoraSpec, seed: int) -> Any:
    """`model` under a fresh LoRA adapter, the base frozen. The adapter's start is a function of `seed`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_dora=spec.dora,
        target_modules=target_modules(model, spec),
        exclude_modules=excluded(model),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, _with_own_layers(config, spec.quantize)).eval()


def load_adapter(model: Any, adapter: Path) -> Any:
    """`model` under the adapter saved in `adapter`, to be trained on."""
    from peft import LoraConfig, PeftModel

    quantize = "nf4" if getattr(model, "is_loaded_in_4bit", False) else "none"
    config = _with_own_layers(LoraConfig.from_pretrained(str(adapter)), quantize)
    config.inference_mode = False
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=True, config=config).eval()


def _with_own_layers(config: Any, quantize: str) -> Any:
    """peft is to build our layers over linear ones; those of 4 bits are bitsandbytes'."""
    if quantize == "none":
        from dpo_service.train.lora_linear import LoraLinear

        config._register_custom_module({nn.Linear: LoraLinear})
    return config


def base_of(policy: Any) -> Any:
    """The transformers model itself, adapters inside its layers."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Arithmetic of the weights' own type, or bfloat16 over float32 weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def adapter_dropout(policy: nn.Module, seed: int) -> Iterator[None]:
    """Within, the adapter's dropout is on and drawn from `seed`. The model's own dropout is off throughout: the
    implicit reward compares with a reference that has none."""
    layers = [module for name, module in policy.named_modules() if "lora_dropout" in name]
    torch.manual_seed(seed)
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


@torch.no_grad()
def merged_state(policy: Any) -> dict[str, Tensor]:
    """The weights by their names in the base model, adapters added in and 4 bits turned back into numbers. The policy
    itself is not touched, because merging and unmerging does not give back the same bits."""
    base = base_of(policy)
    if base is policy:
        return dict(base.state_dict())
    plain = {name: tensor for name, tensor in base.state_dict().items() if not _ADAPTERS_OR_SCALES.search(name)}
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in plain.items()}
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            state[f"{name}.weight"] = _merged_weight(module)
        elif hasattr(getattr(module, "weight", None), "quant_state") and not name.endswith(".base_layer"):
            state[f"{name}.weight"] = _as_numbers(module)
    return state


@torch.no_grad()
def merge(policy: Any) -> None:
    """Have `policy` compute with the weights that are published: adapters added into those of their layers, one by one,
    and off. For good: the weights that were there are gone."""
    for module in base_of(policy).modules():
        if hasattr(module, "get_delta_weight"):
            # A parameter of its own: the one before may be another layer's too.
            module.get_base_layer().weight = nn.Parameter(_merged_weight(module), requires_grad=False)
    policy.base_model.disable_adapter_layers()


def _merged_weight(module: Any) -> Tensor:
    """W' = W + scale B A; with DoRA each row (of an output feature) is then given its trained length (arXiv 2402.09353,
    eq. 5)."""
    weight = _as_numbers(module.get_base_layer())
    merged = weight
    for adapter in module.active_adapters:
        merged = merged + module.get_delta_weight(adapter)
        if adapter in module.lora_magnitude_vector:
            transposed = bool(getattr(module, "fan_in_fan_out", False))
            lengths = torch.linalg.norm(merged, dim=0 if transposed else 1, keepdim=True)
            merged = merged * (module.lora_magnitude_vector[adapter].weight.view_as(lengths) / lengths)
    return merged.to(weight.dtype)


def _as_numbers(layer: Any) -> Tensor:
    """Its weight, out of 4 bits where it is kept so."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(layer)
    return weight


@torch.no_grad()
def export_model(
    policy: Any, state: dict[str, Tensor], base_dir: Path, directory: Path, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Write a Hugging Face directory that transformers and vLLM load: `state` in `dtype`, configuration, tokenizer.

    `state` is what `merged_state` gave; of the policy only its class and configuration are read. Returns the weights as
    they were written, by their names in the model.
    """
    base = base_of(policy)
    config = copy.deepcopy(base.config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None))):
        part.dtype = dtype
    if hasattr(config, "quantization_config"):  # what is written is not quantised
        del config.quantization_config
    shell = _shell(type(base), config)
    weights = _as_written(shell, state, dtype)
    if _differs(shell, weights):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        shell = _shell(type(base), config)
    shell.load_state_dict(weights, assign=True)
    shell.tie_weights()
    shell.generation_config = base.generation_config
    shell.save_pretrained(directory)
    copy_tokenizer(base_dir, directory)
    return weights


def _as_written(shell: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """`state` in host memory and `dtype`, but for what is no floating-point number, and what transformers keeps in
    float32 whatever the model's type is (the biases that choose experts)."""
    from transformers.core_model_loading import build_glob_alternation

    plan = shell._get_dtype_plan(dtype)
    kept = build_glob_alternation(list(plan))[0] if plan else None

    def type_of(name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if kept is not None and kept.search(name) else dtype

    return {name: tensor.detach().to("cpu", type_of(name, tensor)) for name, tensor in state.items()}


def _shell(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind(config)


def _differs(shell: Any, weights: Mapping[str, Tensor]) -> bool:
    """Whether two weights that the model's configuration ties are not one: a file may have a head of its own whatever
    its flag says, and an adapter may be on one of the two."""
    ties: Mapping[str, str] = shell.all_tied_weights_keys
    pairs = [(weights[one], weights[other]) for one, other in ties.items() if one in weights and other in weights]
    return not all(torch.equal(one, other) for one, other in pairs)


def export_adapter(policy: Any, adapter: dict[str, Tensor], directory: Path, base_name: str) -> None:
    """Write `adapter`, the trained tensors by their names in the policy, in peft's layout, float32."""
    policy.peft_config["default"].base_model_name_or_path = base_name
    policy.save_pretrained(directory, state_dict=adapter, save_embedding_layers=False)


def copy_tokenizer(base_dir: Path, directory: Path) -> None:
    """The tokenizer's files, and what makes AutoTokenizer build it alike beside the configuration in `directory`."""
    for pattern in COPIED:
        for path in base_dir.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, directory / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, directory / path.name)
    _keep_class(base_dir, directory)


def _keep_class(base_dir: Path, directory: Path) -> None:
    """A model with parts for images is published as its language model, whose `model_type` may stand for another class
    of tokenizer."""
    if not (base_dir / "tokenizer.json").is_file() or class_of(directory) == (name := class_of(base_dir)):
        return
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"tokenizer_class": name}, indent=2, ensure_ascii=False))
