"""The plan's memory beside what a training process takes on the CPU: the largest resident size of two real steps.

    python -m benchmarks.plan_memory [--only NAME]

Each setting is a process of its own. Measured is how much its largest resident size while it trains exceeds that before
the model was loaded; planned is all parts but the framework, which is what lies there by then. The allocator is told to
give back what is freed (MALLOC_MMAP_THRESHOLD_), so that the resident size is what is used; without that, glibc keeps
up to as much again in holes, which no plan can know.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.turns import peak_gigabytes, restart_peak
from benchmarks.workload import Setting, run_spec
from dpo_service.planning.memory import CPU_FRAMEWORK, memory
from dpo_service.planning.plan import recipe_of
from dpo_service.planning.shape import read_shape
from dpo_service.planning.workload import Lengths, load_of
from dpo_service.specs.adapter import LoraSpec

THRESHOLD = "65536"
GIB = 2**30
MODELS = {
    "12M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 16_000},
    "40M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 32_000},
}


@dataclass(frozen=True)
class Case:
    model: str
    precision: str = "float32"
    lora: int = 0
    reference: str = "cached"
    checkpointing: bool = False
    optimizer: str = "adamw"
    micro_batches: int = 1
    pairs: int = 8
    """Of a micro-batch, each a prompt of 150 tokens and answers of 60."""


CASES = {
    "full": Case("40M"),
    "full, live reference, 2 micro-batches": Case("40M", reference="live", micro_batches=2),
    "full, bfloat16": Case("40M", "bfloat16"),
    "full, pure bfloat16": Case("40M", "pure_bfloat16"),
    "full, checkpointing": Case("40M", checkpointing=True, pairs=16),
    "full, 8-bit moments": Case("40M", optimizer="adamw_8bit"),
    "full, 12M, long": Case("12M", pairs=24),
    "LoRA": Case("40M", lora=16),
    "LoRA, bfloat16, checkpointing, live": Case(
        "40M", "bfloat16", lora=16, checkpointing=True, reference="live", pairs=16
    ),
}


def make_model(directory: Path, sizes: dict[str, int]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = sizes["hidden_size"] // 64
    config = LlamaConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=heads // 2, tie_word_embeddings=True, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def run_of(case: Case, directory: Path) -> Any:
    run = run_spec(Setting("short", 2, case.pairs, case.precision, case.reference, 1, 100, directory))
    changes = {
        "lora": LoraSpec(rank=case.lora) if case.lora else None,
        "activation_checkpointing": case.checkpointing,
        "optim": run.optim.model_copy(update={"optimizer": case.optimizer}),
    }
    return run.model_copy(update=changes)


def lengths_of(case: Case) -> Lengths:
    return Lengths.alike(case.pairs, prompt=150, answer=60)


def planned_bytes(case: Case, directory: Path) -> int:
    recipe = replace(recipe_of(run_of(case, directory), cuda=False), accumulates=case.micro_batches > 1)
    load = load_of(lengths_of(case), range(case.pairs))
    return memory(read_shape(directory, case.model), recipe, load).total - CPU_FRAMEWORK


def child(case: Case, directory: Path) -> None:
    """Train two steps and print how many bytes that took beyond the process as it was."""
    import torch
    import transformers.models.llama.modeling_llama

    torch.set_num_threads(1)
    from dpo_service.train.batch import collate
    from dpo_service.train.ranks import Ranks
    from dpo_service.train.rows import Example
    from dpo_service.train.start import build_state
    from dpo_service.train.step import train_step

    if case.lora:
        import peft

        assert peft
    assert transformers.models.llama.modeling_llama
    run, rng = run_of(case, directory), np.random.default_rng(0)
    lengths, vocabulary = lengths_of(case), MODELS[case.model]["vocab_size"]

    def ids(count: int) -> list[int]:
        return rng.integers(4, vocabulary, int(count)).tolist()

    def example(row: int) -> Example:
        parts = [ids(column[row]) for column in (lengths.prompt, lengths.chosen, lengths.rejected)]
        return Example(*parts, ref_chosen=-300.0, ref_rejected=-300.0)

    before = resident("VmRSS")
    state = build_state(run, directory, None, Ranks(), 2, "base")
    restart_peak()
    for step in range(2):
        batches = [collate([example(row) for row in range(case.pairs)]) for _ in range(case.micro_batches)]
        train_step(state, step, batches, float(case.pairs))
    print(json.dumps({"before": before, "net": peak_gigabytes() * GIB - before}))


def resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measured(case: Case, directory: Path) -> dict[str, float]:
    arguments = [sys.executable, "-m", "benchmarks.plan_memory", "--child", json.dumps(asdict(case)), str(directory)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": THRESHOLD, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--json", type=Path, default=results.DEFAULT)
    parser.add_argument("--child", nargs=2, metavar=("CASE", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(Case(**json.loads(options.child[0])), Path(options.child[1]))
        return
    entries = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in MODELS.items():
            make_model(Path(folder) / name, sizes)
        for name, case in CASES.items():
            if options.only not in (None, name):
                continue
            directory = Path(folder) / case.model
            planned, found = planned_bytes(case, directory), measured(case, directory)
            entries[name] = {"planned": planned, "measured": found["net"], "ratio": planned / found["net"]}
            print(f"{name:40} planned {planned / GIB:6.3f} GiB  measured {found['net'] / GIB:6.3f} GiB  "
                  f"ratio {entries[name]['ratio']:.3f}", flush=True)  # fmt: skip
    worst = max(abs(entry["ratio"] - 1) for entry in entries.values())
    print(f"at most {worst:.1%} apart")
    if options.only is None:
        entry = {"unit": "bytes beyond the framework", "cases": entries, "largest_error": worst}
        results.record(options.json, "plan_memory", entry)


if __name__ == "__main__":
    main()
