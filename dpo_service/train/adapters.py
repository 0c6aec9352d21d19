"""Which layers of a model get an adapter, and which cannot have one.

An adapter must be trainable by peft, be added into the weights when the model is published, and be in use in every way
the model is computed. By default it is on every linear layer of the decoder's layers but for those that are not:

    experts of a mixture        one array for all of them: peft's adapter over it cannot be added into the weights
    routers and gates           they choose, and do not transform; their classes give more than a product
    indexers                    they choose the keys of sparse attention, and have no gradient
    state-space mixers          fused kernels read the weights of all but their first layer past the layer's own forward
    output head, embedding      not by default; a job may name them
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from dpo_service.errors import InvalidSpec, TrainingError
from dpo_service.specs.adapter import CHOOSES, LoraSpec
from dpo_service.train.language import language_body, outside
from dpo_service.train.layers import decoder_layers

SHOWN = 12
PARAM = "lora.target_modules"


def target_modules(shell: Any, spec: LoraSpec) -> list[str]:
    """Names of the modules to adapt, as peft matches them: the last parts of their paths, sorted.

    `shell` is the model before it is adapted, on any device; it is not changed.

    Raises:
        InvalidSpec: a name that the job gives is no module's, or that module can have no adapter; or the model has no
            layer that can.
    """
    if spec.target_modules is not None:
        _require_names(shell, spec)
        return sorted(spec.target_modules)
    names = sorted({path.rpartition(".")[2] for path, _ in _by_default(shell)})
    if _mixes(shell):
        names = [name for name in names if _plain(shell, [name])]
    if not names:
        raise InvalidSpec(
            f"{type(shell).__name__} has no layer that can have an adapter; remove `lora` to train the whole model",
            param="lora",
        )
    return names


def _by_default(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers within decoder layers, with their paths in those."""
    try:
        layers = decoder_layers(model)
    except TrainingError:
        layers = [language_body(model)]
    for layer in layers:
        for path, module in layer.named_modules():
            if _why_not(layer, path, module) is None:
                yield path, module


def _why_not(root: nn.Module, path: str, module: nn.Module) -> str | None:
    """Why the module at `path` below `root` cannot have an adapter by default; None = it can."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, nn.Linear | Conv1D):
        return f"it is a {type(module).__name__}, and no linear layer"
    parent, _, name = path.rpartition(".")
    if CHOOSES.search(path):
        return "it chooses or weighs, and does not transform"
    mixer = root.get_submodule(parent)
    if hasattr(mixer, "A_log") and hasattr(mixer, "D") and not name.startswith("in_proj"):
        return f"the fused kernels of {type(mixer).__name__} read its weight past the adapter"
    return None


def _mixes(model: Any) -> bool:
    """Whether it has experts: peft takes the names of their parts for adapters over the whole array."""
    return any(parameter.dim() == 3 for name, parameter in model.named_parameters() if "expert" in name)


def _require_names(shell: Any, spec: LoraSpec) -> None:
    """The names of a job, as peft takes them: a module is meant whose path ends with one."""
    assert spec.target_modules is not None
    modules = _language(shell)
    for wanted in spec.target_modules:
        meant = {path: module for path, module in modules.items() if path == wanted or path.endswith(f".{wanted}")}
        if not meant:
            raise InvalidSpec(_unknown(wanted, shell), param=PARAM)
        for path, module in meant.items():
            why = _refusal(shell, path, module, spec)
            if why is not None:
                raise InvalidSpec(f"{wanted!r} ({path}) cannot have an adapter: {why}", param=PARAM)
    if not _plain(shell, list(spec.target_modules)):
        raise InvalidSpec(
            f"{', '.join(spec.target_modules)} would put adapters on the experts of {type(shell).__name__}, which are "
            f"one array and cannot be published with them; name {', '.join(_possible(shell))}",
            param=PARAM,
        )


def _language(shell: Any) -> dict[str, nn.Module]:
    """The modules by their paths, without those that read images or sound."""
    foreign = excluded(shell)
    return {path: m for path, m in shell.named_modules() if foreign is None or not re.fullmatch(foreign, path)}


def excluded(model: Any) -> str | None:
    """The paths that get no adapter whatever their names, as peft's `exclude_modules` takes them; None = none."""
    paths = "|".join(map(re.escape, outside(model)))
    return rf"(?:{paths})(?:\..*)?" if paths else None


def _refusal(shell: Any, path: str, module: nn.Module, spec: LoraSpec) -> str | None:
    if isinstance(module, nn.Embedding):
        return "dora has no length of an embedding's rows; set lora.dora to false" if spec.dora else None
    why = _why_not(shell, path, module)
    return None if why is None else f"{why}; there are {', '.join(_possible(shell))}"


def _unknown(wanted: str, shell: Any) -> str:
    names = _possible(shell)
    near = difflib.get_close_matches(wanted.rpartition(".")[2], names, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{type(shell).__name__} has no module {wanted!r}; {meant}There are {', '.join(names)}"


def _possible(shell: Any) -> list[str]:
    """Names a job may give."""
    whole = {"embed_tokens" if path.endswith("embed_tokens") else path.rpartition(".")[2] for path in _ends(shell)}
    return sorted({path.rpartition(".")[2] for path, _ in _by_default(shell)})[:SHOWN] + sorted(whole)


def _ends(shell: Any) -> list[str]:
    """Paths of the embedding and the output head."""
    ends = [shell.get_input_embeddings(), shell.get_output_embeddings()]
    return [path for path, module in shell.named_modules() if any(module is end for end in ends)]


def _plain(shell: Any, names: Sequence[str]) -> bool:
    """Whether peft, given `names`, puts adapters on layers only. Tried on a shell of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import ParamWrapper

    with torch.device("meta"):
        trial = type(shell)(shell.config)
        try:
            config = LoraConfig(r=1, target_modules=list(names), exclude_modules=excluded(trial), task_type="CAUSAL_LM")
            adapted = get_peft_model(trial, config)
        except ValueError:
            return False
    return not any(isinstance(module, ParamWrapper) for module in adapted.modules())


def adapted_layers(shell: Any, names: Sequence[str]) -> int:
    """How many modules `names` mean."""
    paths = list(_language(shell))
    return sum(any(path == name or path.endswith(f".{name}") for name in names) for path in paths)
