"""Our training step on a CUDA device, from a plain one to all that is done to it, beside TRL's DPOTrainer.

    python -m benchmarks.gpu_step [--limit 400] [--models 8B 1.5B] [--json FILE]
    python -m benchmarks.gpu_step --tiny        a two-layer model on whatever device there is: does the script work?

Models in the shapes of Llama 3.1 8B (LoRA, rank 16, on every linear layer) and Qwen2.5 1.5B (trained whole) with random
weights made on the device. A pair of length n has a prompt of n/2 tokens and answers of n/4 to n/2; a micro-batch is as
many pairs as fit the model's budget of tokens, and a step is one micro-batch with its optimizer. The reference's
log-probabilities are known beforehand.

A line is printed and the results are written after every case, and none is begun after `--limit` seconds, so a run that
is cut off keeps what it has. It needs torch 2.11, transformers 5.17, peft, pydantic and pyarrow or newer; no Ray. TRL
and datasets are measured where they are installed, with Liger's kernels where they are.

Utilisation is useful operations (train/flops.py: nothing computed again, no padding) over what `torch.mm` reaches on
the same device. TRL's is counted with the operations of our row, so that the two compare as pairs a second do.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_parts
from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.loss import LossSpec
from dpo_service.specs.optim import OptimSpec
from dpo_service.train.attention import interface as attention
from dpo_service.train.batch import MicroBatch, collate
from dpo_service.train.flops import Cost, matrix_rate
from dpo_service.train.layers import compile_layers, recompute_layers
from dpo_service.train.logprobs import completion_logps, split_head, use_packing
from dpo_service.train.losses import LossInputs, row_losses
from dpo_service.train.optim import build_optimizer, clip_gradients, trained_parameters
from dpo_service.train.policy import add_adapter, base_of
from dpo_service.train.rows import Example

BFLOAT16 = torch.bfloat16
RATE = 1e-6
UNCOUNTED = 3
"""Steps before the timed ones: they compile, for one length and for any, and allocate."""


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
    """Of a micro-batch's row, at most."""


SHAPES = {
    "1.5B": Shape("qwen2", 1536, 8960, 28, 12, 2, 151_936, True, False, 15_400),
    "8B": Shape("llama", 4096, 14336, 32, 32, 8, 128_256, False, True, 10_300),
    "tiny": Shape("llama", 64, 128, 2, 4, 2, 300, True, False, 256),
    "tiny-lora": Shape("llama", 64, 128, 2, 4, 2, 300, False, True, 256),
}


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    weights: str = "float32"
    """of a frozen base, or of what is trained; the arithmetic is bfloat16"""
    adapter: str = "own"
    """`peft`: its own layers"""
    recompute: bool = False
    compiled: bool = False
    backend: str = "auto"


PLAIN = Way(adapter="peft", recompute=True)
LORA_WAYS = {
    "float32 base, peft's layers, recomputed": PLAIN,
    "bfloat16 base": Way("bfloat16", "peft", recompute=True),
    "our adapter layers": Way("bfloat16", recompute=True),
    "nothing recomputed": Way("bfloat16"),
    "compiled": Way("bfloat16", compiled=True),
}
WHOLE_WAYS = {
    "recomputed": Way(recompute=True),
    "nothing recomputed": Way(),
    "compiled": Way(compiled=True),
    "pure bfloat16, compiled": Way("bfloat16", compiled=True),
}
LONG = Way(recompute=True, compiled=True)


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
        """Of a step: a pair has 1.25 times its length in tokens, on average."""
        return max(1, int(self.shape.tokens / (1.25 * self.length)))


def plan(models: list[str], steps: int, device: str) -> Iterator[tuple[Case, str, Way | None]]:
    """The cases with a name for each, the most wanted first; no way = TRL's."""
    ways = {"8B": LORA_WAYS, "1.5B": WHOLE_WAYS}
    middle = [(Case(model, 4096, steps, device), ways[model]) for model in models if model in ways]
    yield from ((case, "compiled", all_ways["compiled"]) for case, all_ways in middle)
    yield from ((case, "TRL", None) for case, _ in reversed(middle))
    for case, all_ways in middle:
        yield from ((case, name, way) for name, way in reversed(all_ways.items()) if name != "compiled")
    if "8B" in models:
        case, best = Case("8B", 4096, steps, device), LORA_WAYS["compiled"]
        yield case, "compiled, FlexAttention", replace(best, backend="flex")
        yield replace(case, length=1024), "compiled", best
        yield replace(case, length=1024), "TRL", None
    if "1.5B" in models:
        case = Case("1.5B", 4096, steps, device)
        yield replace(case, length=1024), "compiled", WHOLE_WAYS["compiled"]
        yield from ((replace(case, length=n), "compiled, recomputed", LONG) for n in (16_384, 32_768))
    for model, ways in (("tiny", WHOLE_WAYS), ("tiny-lora", LORA_WAYS)):
        if model in models:
            case = Case(model, 32, steps, device)
            yield from ((case, name, way) for name, way in ways.items() if device != "cpu" or not way.compiled)
            yield case, "TRL", None


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


def make_model(case: Case, dtype: torch.dtype) -> Any:
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
        max_position_embeddings=65_536,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(case.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def adapted(model: Any, own: bool) -> Any:
    """Under a fresh adapter in float32, as a job has it."""
    if own:
        return add_adapter(model, LoraSpec(rank=16), 0)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def policy_of(case: Case, way: Way) -> Any:
    model = make_model(case, getattr(torch, way.weights))
    split_head(model)
    use_packing(model)
    policy = adapted(model, way.adapter == "own") if case.shape.lora else model
    if way.compiled:
        compile_layers(policy)
    if way.recompute:
        recompute_layers(policy, random=False)
    return policy


def seconds_of(step: Callable[[int], None], case: Case) -> list[float]:
    found = []
    for number in range(case.steps + UNCOUNTED):
        wait(case.device)
        if number == UNCOUNTED and case.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        step(number)
        wait(case.device)
        found.append(time.perf_counter() - started)
    return found[UNCOUNTED:]


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def release(device: str) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def peak_gigabytes(device: str) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / 2**30


def stepper(case: Case, way: Way) -> tuple[Callable[[int], None], Any]:
    """A function that makes the step of a number, and the policy that it moves."""
    policy = policy_of(case, way)
    optimizer = build_optimizer(policy, OptimSpec(learning_rate=RATE))
    parameters = list(trained_parameters(policy).values())
    device = torch.device(case.device)
    batches = [collate(make_pairs(case, number)).to(device) for number in range(case.steps + UNCOUNTED)]

    def step(number: int) -> None:
        with torch.autocast(device.type, BFLOAT16):
            loss = _loss(base_of(policy), batches[number])
        loss.backward()
        clip_gradients(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, policy


def measure_ours(case: Case, way: Way, profiles: Path | None = None) -> dict[str, Any]:
    step, policy = stepper(case, way)
    with nullcontext() if way.backend == "auto" else attention.using(way.backend):
        seconds = seconds_of(step, case)
        if profiles is not None:
            profile(step, profiles / f"profile-{case.model}-{case.length}.txt")
    return {"seconds": seconds, "peak_gigabytes": peak_gigabytes(case.device), **_work(case, Cost.of(policy))}


def profile(step: Callable[[int], None], file: Path) -> None:
    """Write where the last step's time goes on the device, by kernel."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step(UNCOUNTED)
        torch.cuda.synchronize()
    file.write_text(
        recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
    )


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


def _work(case: Case, cost: Cost) -> dict[str, list[float]]:
    """What each timed step did."""
    batches = [collate(make_pairs(case, number)) for number in range(UNCOUNTED, case.steps + UNCOUNTED)]
    return {
        "pairs": [batch.rows for batch in batches],
        "tokens": [batch.tokens for batch in batches],
        "operations": [cost.of_pairs(batch.segments) for batch in batches],
    }


def measure_trl(case: Case, seconds: float) -> dict[str, Any]:
    """In a process of its own, which is ended after `seconds`: it may try several settings before one fits."""
    command = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.gpu_step", "--trl", json.dumps(asdict(case))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode()[-600:]
        raise TimeoutError(f"ended after {seconds:.0f} s; its last words: {' '.join(said.split())}") from None
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr[-600:].split()))
    entry: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return entry


def trl_that_fits(case: Case) -> dict[str, Any]:
    """In as few micro-batches as fit the device, recomputing nothing where that fits."""
    faulthandler.dump_traceback_later(40, repeat=True)
    for parts, recompute in [(parts, recompute) for parts in range(1, case.pairs + 1) for recompute in (False, True)]:
        if case.pairs % parts == 0:
            print(f"{parts} micro-batches, recompute={recompute}", file=sys.stderr, flush=True)
            try:
                return {"micro_batches": parts, "recompute": recompute, **_train_trl(case, parts, recompute)}
            except torch.OutOfMemoryError:
                pass  # released below, after the exception has let go of the frames that hold it
            release(case.device)
    raise torch.OutOfMemoryError("a single pair does not fit")


def _train_trl(case: Case, parts: int, recompute: bool) -> dict[str, Any]:
    """TRL's own loop over the same pairs; a step's time is from one step's start to the next one's."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows = [example for number in range(case.steps + UNCOUNTED) for example in make_pairs(case, number)]
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
            if len(starts) == UNCOUNTED and case.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            starts.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            self.on_step_begin()

    model = make_model(case, BFLOAT16)
    policy = adapted(model, own=False) if case.shape.lora else model
    cost = Cost.of(policy)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Prepared(
            model=policy,
            args=DPOConfig(**_trl_options(case, parts, recompute), output_dir=folder),
            train_dataset=Dataset.from_dict(columns),
            processing_class=_tokenizer(case),
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = [end - start for start, end in pairwise(starts)][UNCOUNTED:]
    return {"seconds": seconds, "peak_gigabytes": peak_gigabytes(case.device), **_work(case, cost)}


def _trl_options(case: Case, parts: int, recompute: bool) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": case.pairs // parts,
        "gradient_accumulation_steps": parts,
        "max_steps": case.steps + UNCOUNTED,
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
        "bf16": case.device != "cpu",  # the adapter's weights are float32
        "gradient_checkpointing": recompute,
        "use_liger_kernel": case.device != "cpu" and importlib.util.find_spec("liger_kernel") is not None,
    }


def _tokenizer(case: Case) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def has_trl() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in ("trl", "datasets"))


def measurements(
    cases: Iterator[tuple[Case, str, Way | None]], ends: float, profiles: Path | None = None, trl_seconds: float = 120
) -> Iterator[dict[str, Any]]:
    """An entry a case; one that cannot be computed has the reason. `profiles` gets those of the compiled steps."""
    for case, name, way in cases:
        if way is None and not has_trl():
            continue
        entry: dict[str, Any] = asdict(case) | {"way": name, "options": None if way is None else asdict(way)}
        if time.monotonic() > ends:
            yield entry | {"failed": "not begun: the time is up"}
            continue
        started = time.monotonic()
        try:
            entry |= (
                measure_trl(case, trl_seconds)
                if way is None
                else measure_ours(case, way, profiles if way.compiled else None)
            )
        except Exception as error:  # whatever it is, the other cases are to have their turn
            entry["failed"] = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        release(case.device)
        yield entry | _rates(entry) | {"wall": round(time.monotonic() - started, 1)}


def _rates(entry: dict[str, Any]) -> dict[str, float]:
    """Medians over the steps of what each did in its time."""
    if "failed" in entry:
        return {}
    rates = {
        name: statistics.median(work / seconds for work, seconds in zip(entry[name], entry["seconds"], strict=True))
        for name in ("pairs", "tokens", "operations")
    }
    return {
        "pairs_per_second": rates["pairs"],
        "tokens_per_second": rates["tokens"],
        "tflops": rates["operations"] / 1e12,
        "utilisation": rates["operations"] / matrix_rate(torch.device(entry["device"]), BFLOAT16),
    }


def line(entry: dict[str, Any]) -> str:
    start = f"{entry['model']:>9} {entry['length']:>6} {entry['way']:<40}"
    if "failed" in entry:
        return f"{start} {entry['failed'][:110]}"
    return (
        f"{start} {entry['pairs_per_second']:8.2f} {entry['tokens_per_second']:9.0f} {entry['tflops']:8.1f} "
        f"{entry['utilisation']:6.1%} {entry['peak_gigabytes']:7.1f} {entry['wall']:6.0f}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("8B", "1.5B"), default=["8B", "1.5B"])
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--limit", type=float, default=420, help="seconds after which no case is begun")
    parser.add_argument("--no-parts", action="store_true", help="whole steps only")
    parser.add_argument("--profiles", type=Path, help="folder for profiles of the compiled steps, by kernel")
    parser.add_argument("--trl-limit", type=float, default=120, help="seconds for a case of TRL's")
    parser.add_argument("--trl", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="tiny models, on any device")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("gpu_results.json"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.trl is not None:
        print("\n" + json.dumps(trl_that_fits(Case(**options.trl))))
        return
    ends = time.monotonic() + options.limit
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        print("skipped: torch sees no CUDA device here (--tiny tries the script on a CPU)")
        return
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    rate = matrix_rate(torch.device(device), BFLOAT16)
    versions = {package: version(package) for package in ("torch", "transformers", "peft")}
    if has_trl():
        versions["trl"] = version("trl")
    report: dict[str, Any] = {"device": name, "matrix_rate": rate, "versions": versions, "parts": [], "entries": []}
    print(f"{name}, torch {torch.__version__}, torch.mm in bfloat16: {rate / 1e12:.1f} TFLOP/s")
    if not options.no_parts:
        for part in gpu_parts.measurements(device, tiny=options.tiny):
            print(gpu_parts.line(part), flush=True)
            report["parts"].append(part)
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{'model':>9} {'length':>6} {'way':<40} {'pairs/s':>8} {'tokens/s':>9} {'TFLOP/s':>8} {'MFU':>6} "
        f"{'peak GB':>7} {'wall s':>6}"
    )
    models = ["tiny", "tiny-lora"] if options.tiny else options.models
    for entry in measurements(plan(models, options.steps, device), ends, options.profiles, options.trl_limit):
        print(line(entry), flush=True)
        report["entries"].append(entry)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if not has_trl():
        print("TRL is not installed here, so it is not in the table (pip install trl datasets)")


if __name__ == "__main__":
    main()
