"""Reading a model of transformers: its own weights, all of them, or none.

`read` is the one place that calls `from_pretrained` for a model. On the meta device it reads the headers of the weight
files and no weight, and raises for the same reasons: that is how a checkpoint is checked before a job is accepted
(`inspection/weights.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from dpo_service.errors import ModelRefused
from dpo_service.storage.weights import FLOATS, Stored, quantised_as, renaming, stored_weights

SHOWN = 4
"""Names of weights in a message."""
HEAD = "lm_head.weight"


def read(
    loader: Any,
    path: Path,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device | str = "cpu",
    quantization_config: Any = None,
) -> Any:
    """The model in `path` by `loader`, an auto class or a model class of transformers, in evaluation mode.

    Names under the wrappers of torch.compile, peft and their like are read as if they had none; weights in 8 or 4 bits
    are turned back into numbers where transformers can. Safetensors only; no code from the model is run.

    Raises:
        ModelRefused: a weight that the model needs is missing, has another shape or type, or one is there that it has
            no place for; the message has their names.
    """
    stored = stored_weights(path)
    config = json.loads((path / "config.json").read_text())
    method = quantised_as(config)
    if method is None:
        _require_numbers(stored)
    options: dict[str, Any] = {}
    if renamed := renaming(stored):
        options["key_mapping"] = renamed
    with _quiet():
        try:
            model, report = loader.from_pretrained(
                path,
                dtype=dtype,
                device_map={"": device},
                quantization_config=quantization_config or _dequantising(method, config),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        except RuntimeError as error:  # weights that are stored in parts, and do not fit together
            raise ModelRefused(
                f"the weights do not fit the model's configuration: {str(error).strip().splitlines()[0]}", param="model"
            ) from error
    _require_all(report, type(model).__name__)
    return model.eval()


def has_own_head(path: Path) -> bool:
    """Whether the files hold an output head that is no copy of another weight, the embedding. transformers and vLLM
    then both have it stay what it is, even if config.json says that the two are tied."""
    stored = stored_weights(path)
    if HEAD not in stored:
        return False
    head = _stored_tensor(path, HEAD, stored[HEAD])
    alike = [name for name, weight in stored.items() if name != HEAD and weight.shape == stored[HEAD].shape]
    return not any(torch.equal(head, _stored_tensor(path, name, stored[name])) for name in alike)


def _stored_tensor(path: Path, name: str, stored: Stored) -> torch.Tensor:
    with safe_open(path / stored.file, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _require_numbers(stored: Mapping[str, Stored]) -> None:
    """Of a checkpoint that does not say it is quantised. A mask or a counter may be whole numbers; a matrix may not."""
    wrong = [
        f"{n} ({w.dtype})" for n, w in stored.items() if w.dtype not in FLOATS and n.endswith((".weight", ".bias"))
    ]
    if wrong:
        raise ModelRefused(
            f"{len(wrong)} weights are no floating-point numbers of 16 bits or more, and config.json has no "
            f"quantization_config that says what they are: {_some(wrong)}; give the model they were made from",
            param="model",
        )


def _require_all(report: Mapping[str, Any], name: str) -> None:
    """Raises ModelRefused with what `report`, transformers' loading info, says is not as it should be."""
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    shapes = [f"{key} is {tuple(found)} and not {tuple(needed)}" for key, found, needed in report["mismatched_keys"]]
    faults = []
    if missing:
        faults.append(f"{len(missing)} weights are missing: {_some(missing)}")
    if unexpected:
        faults.append(f"{len(unexpected)} have no place in the model: {_some(unexpected)}")
    if shapes:
        faults.append(f"{len(shapes)} have another shape: {_some(sorted(shapes))}")
    faults += [str(message) for message in report.get("error_msgs") or ()]
    if faults:
        adapter = any(".lora_" in key for key in unexpected)
        fix = (
            "merge the adapter into its base model first (merge_and_unload)"
            if adapter
            else ("save the whole model again with save_pretrained, and see that config.json is its own")
        )
        raise ModelRefused(
            f"the weight files do not hold a {name}: {'; '.join(faults)}. To fix it, {fix}", param="model"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _dequantising(method: str | None, config: Mapping[str, Any]) -> Any:
    """What makes transformers turn the weights back into numbers; None = they are numbers."""
    from transformers import FineGrainedFP8Config, Mxfp4Config

    if method is None:
        return None
    settings = dict(config.get("quantization_config") or config["text_config"]["quantization_config"])
    settings.pop("quant_method")
    kind = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[method]
    return kind(**{**settings, "dequantize": True})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report, whose content is in the error, and without progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logger = logging.get_logger("transformers")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
        logging.set_verbosity(level)
