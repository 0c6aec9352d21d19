"""Our training step on a CUDA device: every attention backend, beside TRL's DPOTrainer where it is installed.

    python -m benchmarks.gpu_step [--models 0.5B 1.5B 8B] [--lengths 512 2048 8192] [--backends varlen flex sdpa]
    python -m benchmarks.gpu_step --tiny                 a two-layer model on whatever there is: does the script work?

Models in the shapes of Qwen2.5 and Llama 3 with random weights made on the device, bfloat16; the 8B one with LoRA, the
others whole. A pair of length n has a prompt of n/2 tokens and answers of n/4 to n/2; a micro-batch is as many pairs as
fit the model's budget of tokens, and a step is one micro-batch with its optimizer. The reference's log-probabilities
are known beforehand. It needs torch 2.11, transformers 5.17, peft, pydantic and pyarrow or newer; no Ray.

Utilisation is useful operations (train/flops.py: nothing computed again, no padding) over what `torch.mm` reaches on
the same device. TRL's is counted with the operations of our row, so that the two compare as pairs a second do.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.loss import LossSpec
from dpo_service.specs.optim import OptimSpec
from dpo_service.train.attention import interface as attention
from dpo_service.train.batch import MicroBatch, collate
from dpo_service.train.flops import Cost, matrix_rate
from dpo_service.train.layers import recompute_layers
from dpo_service.train.logprobs import completion_logps, split_head, use_packing
from dpo_service.train.losses import LossInputs, row_losses
from dpo_service.train.optim import build_optimizer, clip_gradients, trained_parameters
from dpo_service.train.policy import add_adapter, base_of
from dpo_service.train.rows import Example

DTYPE = torch.bfloat16
RATE = 1e-6
ACTIVATIONS = 34 * 2
"""Bytes that a token's activations take in a layer, by hidden size (arXiv 2205.05198, table 2, without attention)."""


@dataclass(frozen=True)
class Shape:
    kind: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool
    lora: bool
    tokens: int
    """Of a micro-batch's row."""


SHAPES = {
    "0.5B": Shape("qwen2", 896, 4864, 24, 14, 2, 151_936, True, False, 32_768),
    "1.5B": Shape("qwen2", 1536, 8960, 28, 12, 2, 151_936, True, False, 32_768),
    "8B": Shape("llama", 4096, 14336, 32, 32, 8, 128_256, False, True, 16_384),
    "tiny": Shape("llama", 64, 128, 2, 4, 2, 300, True, False, 256),
}
BACKENDS = ("varlen", "flex", "sdpa")


@dataclass(frozen=True)
class Case:
    model: str
    length: int
    steps: int
    device: str

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    @property
    def pairs(self) -> int:
        """A power of two, so that TRL can take them in halves, quarters and so on."""
        return 2 ** max(0, int(math.log2(self.shape.tokens / (1.25 * self.length))))


def make_pairs(case: Case, step: int) -> list[Example]:
    rng = np.random.default_rng(step)

    def ids(length: int) -> list[int]:
        return rng.integers(4, case.shape.vocabulary, length).tolist()

    half = case.length // 2
    lengths = rng.integers(half // 2, half + 1, (case.pairs, 2))
    return [
        Example(prompt=ids(half), chosen=ids(chosen), rejected=ids(rejected), ref_chosen=-1.0, ref_rejected=-1.0)
        for chosen, rejected in lengths.tolist()
    ]


def make_model(case: Case) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = case.shape
    config = AutoConfig.for_model(
        shape.kind,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=16_384,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(case.device):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()


def recomputes(case: Case) -> bool:
    """Whether a row's activations would take more than half of the device."""
    if case.device == "cpu":
        return False
    needed = ACTIVATIONS * case.shape.hidden * case.shape.layers * max(case.shape.tokens, 1.5 * case.length)
    return bool(needed > torch.cuda.get_device_properties(0).total_memory / 2)


def seconds_of(step: Callable[[int], None], case: Case) -> list[float]:
    """Of every step but the first two, which compile and allocate."""
    found = []
    for number in range(case.steps + 2):
        wait(case.device)
        if number == 2 and case.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        step(number)
        wait(case.device)
        found.append(time.perf_counter() - started)
    return found[2:]


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def release(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def peak_gigabytes(device: str) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / 2**30


def measure_ours(case: Case, backend: str) -> dict[str, Any]:
    model = make_model(case)
    split_head(model)
    use_packing(model)
    policy = add_adapter(model, LoraSpec(rank=16), 0).to(DTYPE) if case.shape.lora else model
    if recomputes(case):
        recompute_layers(policy, random=False)
    optimizer = build_optimizer(policy, OptimSpec(learning_rate=RATE))
    batches = [collate(make_pairs(case, number)).to(torch.device(case.device)) for number in range(case.steps + 2)]

    def step(number: int) -> None:
        loss = _loss(base_of(policy), batches[number])
        loss.backward()
        clip_gradients(list(trained_parameters(policy).values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with attention.using(backend):
        seconds = seconds_of(step, case)
    cost = Cost.of(policy)
    return {"seconds": seconds, "peak_gigabytes": peak_gigabytes(case.device), **_work(case, cost)}


def _loss(model: Any, batch: MicroBatch) -> torch.Tensor:
    logps_S, rows = completion_logps(model, batch).logps_S, batch.rows
    lengths_S = batch.lengths_S
    inputs = LossInputs(
        chosen_P=logps_S[:rows],
        chosen_tokens_P=lengths_S[:rows],
        rejected_P=logps_S[rows:],
        rejected_tokens_P=lengths_S[rows:],
        ref_chosen_P=batch.ref_chosen_P,
        ref_rejected_P=batch.ref_rejected_P,
    )
    return row_losses(inputs, LossSpec(name="sigmoid")).mean()


def _work(case: Case, cost: Cost) -> dict[str, float]:
    """What the timed steps did, in all."""
    batches = [collate(make_pairs(case, number)) for number in range(2, case.steps + 2)]
    return {
        "pairs": sum(batch.rows for batch in batches),
        "tokens": sum(batch.tokens for batch in batches),
        "operations": sum(cost.of_pairs(batch.segments) for batch in batches),
    }


def measure_trl(case: Case, _: str) -> dict[str, Any]:
    """In one micro-batch a step where that fits the device, else in as many as it takes."""
    parts = 1
    while True:
        try:
            return {"micro_batches": parts, **_train_trl(case, parts)}
        except torch.OutOfMemoryError:
            if parts >= case.pairs:
                raise
            parts *= 2
        release(case.device)


def _train_trl(case: Case, parts: int) -> dict[str, Any]:
    """TRL's own loop over the same pairs; a step's time is from one step's start to the next one's."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows = [example for number in range(case.steps + 2) for example in make_pairs(case, number)]
    columns = {f"{name}_ids": [getattr(row, name) for row in rows] for name in ("prompt", "chosen", "rejected")}
    columns |= {f"ref_{name}_logps": [-1.0] * len(rows) for name in ("chosen", "rejected")}
    starts: list[float] = []

    class Prepared(DPOTrainer):
        """Takes rows that are token ids already, in their order, with the reference's log-probabilities."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _precompute_ref_logps(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, *_, **__):
            return SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            wait(case.device)
            if len(starts) == 2 and case.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            starts.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            self.on_step_begin()

    policy = add_adapter(make_model(case), LoraSpec(rank=16), 0).to(DTYPE) if case.shape.lora else make_model(case)
    cost = Cost.of(policy)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Prepared(
            model=policy,
            args=DPOConfig(**_trl_options(case, parts), output_dir=folder),
            train_dataset=Dataset.from_dict(columns),
            processing_class=_tokenizer(case),
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = [end - start for start, end in pairwise(starts)][2:]
    return {"seconds": seconds, "peak_gigabytes": peak_gigabytes(case.device), **_work(case, cost)}


def _trl_options(case: Case, parts: int) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": case.pairs // parts,
        "gradient_accumulation_steps": parts,
        "max_steps": case.steps + 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "beta": 0.1,
        "precompute_ref_log_probs": True,
        "max_length": None,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": case.device == "cpu",
        "bf16": False,  # the weights are bfloat16 already
        "gradient_checkpointing": recomputes(case),
    }


def _tokenizer(case: Case) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def measurements(cases: list[Case], backends: list[str]) -> Iterator[dict[str, Any]]:
    """One entry a case and way; a way that cannot compute a case says why."""
    ways: dict[str, Callable[[Case, str], dict[str, Any]]] = dict.fromkeys(backends, measure_ours)
    if importlib.util.find_spec("trl") and importlib.util.find_spec("datasets"):
        ways["TRL"] = measure_trl
    for case in cases:
        for way, measure in ways.items():
            entry = asdict(case) | {"way": way, "recomputes": recomputes(case)}
            try:
                entry |= measure(case, way)
            except (torch.OutOfMemoryError, NotImplementedError, RuntimeError) as error:
                entry["failed"] = str(error).strip().partition("\n")[0] or type(error).__name__
            yield entry | _rates(entry)
            release(case.device)


def _rates(entry: dict[str, Any]) -> dict[str, float]:
    """By the median step; their work differs little."""
    if "failed" in entry:
        return {}
    seconds = statistics.median(entry["seconds"]) * len(entry["seconds"])
    rate = matrix_rate(torch.device(entry["device"]), DTYPE)
    return {
        "pairs_per_second": entry["pairs"] / seconds,
        "tokens_per_second": entry["tokens"] / seconds,
        "utilisation": entry["operations"] / seconds / rate,
    }


def line(entry: dict[str, Any]) -> str:
    start = f"{entry['model']:>5} {entry['length']:>6} {entry['way']:>7}"
    if "failed" in entry:
        return f"{start}   {entry['failed'][:90]}"
    return (
        f"{start} {entry['pairs_per_second']:9.2f} {entry['tokens_per_second']:10.0f} "
        f"{entry['utilisation']:6.1%} {entry['peak_gigabytes']:8.1f}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["0.5B", "1.5B", "8B"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--steps", type=int, default=5, help="timed steps; two more come before")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, two lengths, on any device")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("gpu_results.json"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        print("skipped: torch sees no CUDA device here (--tiny tries the script on a CPU)")
        return
    models, lengths, steps = options.models, options.lengths, options.steps
    backends = options.backends
    if options.tiny:
        models, lengths, steps = ["tiny"], [32, 64], 2
        backends = backends if device == "cuda" else ["sdpa"]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    rate = matrix_rate(torch.device(device), DTYPE)
    print(f"{name}, torch {torch.__version__}, torch.mm in bfloat16: {rate / 1e12:.1f} TFLOP/s")
    print(f"{'model':>5} {'length':>6} {'way':>7} {'pairs/s':>9} {'tokens/s':>10} {'MFU':>6} {'peak GB':>8}")
    entries = []
    for entry in measurements([Case(m, n, steps, device) for m in models for n in lengths], backends):
        print(line(entry), flush=True)
        entries.append(entry)
    if not any(entry["way"] == "TRL" for entry in entries):
        print("TRL is not installed here, so it is not in the table (pip install trl)")
    versions = {package: version(package) for package in ("torch", "transformers")}
    found = {"device": name, "matrix_rate": rate, "versions": versions, "entries": entries}
    options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
