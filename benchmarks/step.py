"""Our training step beside that of TRL's DPOTrainer: the same rows, model, batch and precision on the CPU.

    python -m benchmarks.step [--rows short|long] [--steps 5] [--batch 8] [--precision float32|bfloat16] [--threads 2]

A 40M-parameter Llama with a vocabulary of 32,000; random rows, whose lengths are log-normal with the means named below.
Both have the reference's log-probabilities beforehand. Each trainer is a process of its own, and they take their steps
by turns, so that whatever else the machine does meets both:

    parent: go -> ours: a step -> seconds     go -> TRL: a step -> seconds     go -> ours: ...

A step's time is all from one step's start to the next one's: collating, forward, backward, optimizer, logging. Peak
memory is the process's largest resident size while it trains. The first step of each is not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results

LENGTHS = {"short": ((120, 800), (40, 550), None), "long": ((400, 3500), (300, 900), 1024)}
"""(mean, largest) of prompts and of answers, and the length that prompt and answer are cut to, in tokens."""
SPREAD = 0.9
"""Standard deviation of a length's logarithm."""
RATE = 5e-5


@dataclass(frozen=True)
class Setting:
    rows: str
    steps: int
    batch: int
    precision: str
    threads: int
    vocabulary: int
    folder: Path

    @property
    def model_dir(self) -> Path:
        return self.folder / "model"


Columns = dict[str, list[list[int]]]


def make_rows(setting: Setting) -> Columns:
    """Random token ids; a prompt too long for its answers is cut at its start."""
    prompts, answers, limit = LENGTHS[setting.rows]
    rng = np.random.default_rng(0)

    def ids(mean: int, largest: int) -> list[int]:
        length = rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD)
        return rng.integers(4, setting.vocabulary, int(np.clip(length, 2, largest))).tolist()

    columns: Columns = {"prompt": [], "chosen": [], "rejected": []}
    for _ in range(setting.steps * setting.batch):
        prompt, chosen, rejected = ids(*prompts), ids(*answers), ids(*answers)
        room = limit - max(len(chosen), len(rejected)) if limit else len(prompt)
        for name, value in (("prompt", prompt[-room:]), ("chosen", chosen), ("rejected", rejected)):
            columns[name].append(value)
    return columns


def make_model(setting: Setting) -> int:
    """Write a random model and a tokenizer; returns its number of parameters."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, setting.vocabulary)}
    core = Tokenizer(WordLevel(words, unk_token="<eos>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(setting.model_dir)
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(setting.model_dir)
    return int(model.num_parameters())


class Turns:
    """A trainer's side of taking turns: `wait` at the start of each step and once after the last."""

    def __init__(self, parent: Connection) -> None:
        self._parent = parent
        self._started: float | None = None

    def wait(self, *, last: bool = False) -> None:
        if self._started is None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        else:
            self._parent.send(time.perf_counter() - self._started)
        if not last:
            self._parent.recv()
            self._started = time.perf_counter()


def peak_gigabytes() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def train_ours(setting: Setting, columns: Columns, turns: Turns) -> list[float]:
    """Losses by step."""
    import pyarrow as pa

    from dpo_service.train.batch import collate
    from dpo_service.train.optim import build_optimizer
    from dpo_service.train.policy import load_model
    from dpo_service.train.ranks import Ranks
    from dpo_service.train.reference import ReferenceScorer, cached_reference
    from dpo_service.train.rows import RowTable
    from dpo_service.train.step import TrainState, train_step

    run, losses = _run_spec(setting), []
    scorer = ReferenceScorer(
        str(setting.model_dir),
        setting.precision,
        run.batch,
    )
    rows = RowTable(scorer(pa.table(columns)))
    policy = load_model(setting.model_dir)
    state = TrainState(run, policy, cached_reference, build_optimizer(policy, run.optim), Ranks(), setting.steps)
    for step in range(setting.steps):
        turns.wait()
        batch = collate(rows.take(range(step * setting.batch, (step + 1) * setting.batch)))
        losses.append(float(train_step(state, step, [batch], float(setting.batch)).sums["loss"]) / setting.batch)
    turns.wait(last=True)
    return losses


def _run_spec(setting: Setting) -> Any:
    from dpo_service.specs.data import DataSpec
    from dpo_service.specs.loss import LossSpec
    from dpo_service.specs.method import ReferenceSpec
    from dpo_service.specs.optim import OptimSpec
    from dpo_service.specs.resources import ResourceSpec
    from dpo_service.specs.run import BatchSpec, ModelSource, RunSpec

    return RunSpec(
        job_id="bench",
        method="dpo",
        model=ModelSource(name="bench", path=str(setting.model_dir)),
        data=DataSpec(rows="pairs", training_file="files/f", training_name="f.jsonl", max_length=8192),
        loss=LossSpec(name="sigmoid", beta=0.1),
        reference=ReferenceSpec(mode="cached"),
        optim=OptimSpec(learning_rate=RATE, lr_schedule="constant", warmup_ratio=0.0, weight_decay=0.0),
        batch=BatchSpec(
            batch_size=setting.batch,
            micro_batch_size=setting.batch,
            micro_batch_tokens=2**24,
            n_epochs=1,
            max_steps=setting.steps,
        ),
        precision=setting.precision,
        resources=ResourceSpec(),
        seed=0,
        output_model="ft:bench::bench",
    )


def train_trl(setting: Setting, columns: Columns, turns: Turns) -> list[float]:
    """Losses by step."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class PreparedTrainer(DPOTrainer):
        """Takes rows that are token ids already, in their order."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, *_, **__):
            return SequentialSampler(self.train_dataset)

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            turns.wait()

        def on_train_end(self, *_, **__):
            turns.wait(last=True)

    config = DPOConfig(
        output_dir=str(setting.folder / "trl"),
        per_device_train_batch_size=setting.batch,
        max_steps=setting.steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.1,
        precompute_ref_log_probs=True,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=setting.precision == "bfloat16",
        gradient_checkpointing=False,
    )
    trainer = PreparedTrainer(
        model=AutoModelForCausalLM.from_pretrained(setting.model_dir, dtype="float32"),
        ref_model=AutoModelForCausalLM.from_pretrained(setting.model_dir, dtype="float32"),
        args=config,
        train_dataset=Dataset.from_dict({f"{name}_ids": values for name, values in columns.items()}),
        processing_class=AutoTokenizer.from_pretrained(setting.model_dir),
        callbacks=[TakeTurns()],
    )
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


TRAINERS = {"ours": train_ours, "TRL": train_trl}


def trainer_process(name: str, setting: Setting, columns: Columns, parent: Connection) -> None:
    import torch

    torch.set_num_threads(setting.threads)
    losses = TRAINERS[name](setting, columns, Turns(parent))
    parent.send({"losses": losses, "peak": peak_gigabytes()})


def measure(setting: Setting, columns: Columns) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds by step, and what each said at its end."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in TRAINERS:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=trainer_process, args=(name, setting, columns, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    seconds: dict[str, list[float]] = {name: [] for name in TRAINERS}
    for _ in range(setting.steps):
        for name, pipe in pipes.items():
            pipe.send("go")
            seconds[name].append(pipe.recv())
    ends = {name: pipe.recv() for name, pipe in pipes.items()}
    for process in processes:
        process.join()
    return seconds, ends


def summary(setting: Setting, columns: Columns, parameters: int) -> dict[str, Any]:
    seconds, ends = measure(setting, columns)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    pairs = zip(ends["ours"]["losses"], ends["TRL"]["losses"], strict=True)
    return {
        "unit": "seconds a step",
        "ours": medians["ours"],
        "peer": medians["TRL"],
        "ratio": medians["TRL"] / medians["ours"],
        "steps": seconds,
        "peak_gigabytes": {name: end["peak"] for name, end in ends.items()},
        "memory_ratio": ends["ours"]["peak"] / ends["TRL"]["peak"],
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
        "parameters": parameters,
        "mean_tokens": {name: statistics.mean(map(len, values)) for name, values in columns.items()},
        "setting": {name: value for name, value in asdict(setting).items() if name != "folder"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", choices=LENGTHS, default="short")
    parser.add_argument("--steps", type=int, default=5, help="at least 2; the first is not counted")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step, one micro-batch")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--json", type=Path, default=results.DEFAULT)
    options = vars(parser.parse_args())
    path = options.pop("json")
    os.environ["OMP_NUM_THREADS"] = str(options["threads"])
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(**options, folder=Path(folder))
        found = summary(setting, make_rows(setting), make_model(setting))
    peaks = found["peak_gigabytes"]
    print(f"{'':6} {'s/step':>8} {'peak GB':>8}")
    for name, value in (("ours", found["ours"]), ("TRL", found["peer"])):
        print(f"{name:6} {value:8.2f} {peaks[name]:8.2f}")
    print(f"{found['ratio']:.2f} times as fast, {found['memory_ratio']:.2f} of the memory")
    print(f"losses differ by {found['largest_loss_difference']:.1e} at most")
    results.record(path, f"step/{setting.rows}/{setting.precision}/{setting.vocabulary}", found)


if __name__ == "__main__":
    main()
