"""The weights that a model directory holds, from the headers of its safetensors files. Reads no weight.

The files are those that transformers reads: `model.safetensors`, else the shards that `model.safetensors.index.json`
names. Others in the directory do not count.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from dpo_service.errors import ModelRefused

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES = 100 << 20
"""The format's own limit."""
_LENGTH = struct.Struct("<Q")
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip
FLOATS = ("F64", "F32", "BF16", "F16")

WRAPPERS = (
    r"^(?:_orig_mod\.|module\.|base_model\.model\.|_fsdp_wrapped_module\.)+",
    r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.",
)
"""What torch.compile, DistributedDataParallel, peft and FSDP put into the names of the weights that they wrap."""


DEQUANTISED = ("fp8", "mxfp4")
"""Ways of quantising whose weights are turned back into numbers when they are read (`quant_method`)."""


class Stored(NamedTuple):
    file: str
    dtype: str
    """As safetensors writes it."""
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return prod(self.shape)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights; raises ModelRefused where one is missing."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        there = ", ".join(sorted(path.name for path in directory.glob("*.safetensors"))[:3])
        raise _refused(
            f"it holds neither {SINGLE} nor {INDEX}{f', only {there}' if there else ''}; "
            "save it with save_pretrained(..., safe_serialization=True)"
        )
    names = sorted(set(_index(directory).values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise _refused(
            f"{INDEX} names {len(names)} files and {len(missing)} of them are missing ({_some(missing)}); copy them too"
        )
    return [directory / name for name in names]


def stored_weights(directory: Path) -> dict[str, Stored]:
    """Every weight by its name.

    Raises:
        ModelRefused: a file is missing, is cut short or is no safetensors file, or a weight is not where it is said to
            be.
    """
    weights: dict[str, Stored] = {}
    for path in weight_files(directory):
        for name, entry in read_header(path).items():
            if name in weights:
                raise _refused(f"weight {name} is in {weights[name].file} and in {path.name}; remove one")
            weights[name] = entry
    if not (directory / SINGLE).is_file():
        lost = [name for name, file in _index(directory).items() if name not in weights or weights[name].file != file]
        if lost:
            raise _refused(
                f"{len(lost)} weights are not in the file that {INDEX} names for them ({_some(lost)}); "
                "save the model again"
            )
    return weights


def read_header(path: Path) -> dict[str, Stored]:
    """The weights of one file; raises ModelRefused where it is no whole safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else size
        if length > min(HEADER_BYTES, size - _LENGTH.size):
            raise _refused(f"{path.name} is no safetensors file, or was cut short; copy it again")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            weights = {
                name: Stored(path.name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
                for name, entry in entries.items()
            }
            places = {name: [int(n) for n in entry["data_offsets"]] for name, entry in entries.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise _refused(f"the header of {path.name} cannot be read; copy it again") from None
    room = size - _LENGTH.size - length
    for name, (begin, end) in places.items():
        bits = BITS.get(weights[name].dtype)
        if not 0 <= begin <= end <= room or (bits is not None and 8 * (end - begin) != weights[name].numbers * bits):
            raise _refused(f"{path.name} was cut short, or weight {name} is not as its header says; copy it again")
    return weights


def renaming(names: Iterable[str]) -> dict[str, str]:
    """Patterns to remove from the names so that they are the model's own, as transformers takes them; {} = none."""
    wrapped = any(re.search(pattern, name) for name in names for pattern in WRAPPERS)
    return dict.fromkeys(WRAPPERS, "") if wrapped else {}


def quantised_as(config: Mapping[str, Any]) -> str | None:
    """The `quant_method` of a checkpoint whose config.json this is; None = its weights are plain numbers.

    Raises:
        ModelRefused: they cannot be turned back into numbers here.
    """
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not settings:
        return None
    method = str(settings.get("quant_method") or ("bitsandbytes" if settings.get("load_in_4bit") else "an unknown way"))
    if method in DEQUANTISED:
        return method
    raise ModelRefused(
        f"its weights are quantised ({method}), and training needs them as numbers; give the model it was made from, "
        f"or load it with transformers, dequantize() it and save it again (only {' and '.join(DEQUANTISED)} are read "
        "as they are)",
        param="model",
    )


def _index(directory: Path) -> dict[str, str]:
    """Weights to files, from the index."""
    try:
        index: Any = json.loads((directory / INDEX).read_text())
        files = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
        raise _refused(f"{INDEX} cannot be read; save the model again") from None
    outside = [file for file in files.values() if Path(file).name != file]
    if outside:
        raise _refused(f"{INDEX} names {outside[0]!r}, which is no file of this directory")
    return files


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _refused(why: str) -> ModelRefused:
    return ModelRefused(why, param="model")
