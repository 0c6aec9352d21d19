"""Our training step beside that of TRL's DPOTrainer: the same rows, model, batch and precision on the CPU.

    python -m benchmarks.step [--rows short|long|FILE] [--steps 5] [--batch 8] [--precision float32|bfloat16]
                              [--reference cached|live] [--threads 2] [--vocabulary 32000]

A 40M-parameter Llama with a vocabulary of 32,000; random rows, whose lengths are log-normal with the means named in
workload.py, or those of a preference file's texts. Each trainer is a process of its own, and they take their steps by
turns (turns.py); then `torch.mm` is measured on the same cores, and ours once more, each alone.

A step's time is all from one step's start to the next one's: collating, forward, backward, optimizer, logging. Peak
memory is the process's largest resident size while it trains. The first step of each is not counted. Utilisation
counts only operations that the step cannot do without (train/flops.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.turns import Trainer, Turns, by_turns
from benchmarks.workload import LENGTHS, RATE, Columns, Setting, make_model, make_rows, run_spec

ALONE_STEPS = 8
"""At least so many, and the machine to itself, for the utilisation."""


def train_ours(setting: Setting, columns: Columns, turns: Turns) -> dict[str, Any]:
    """Losses, and useful operations, by step."""
    import pyarrow as pa

    from dpo_service.rows.plan import BatchPlan
    from dpo_service.train.batch import collate
    from dpo_service.train.flops import Cost
    from dpo_service.train.optim import build_optimizer
    from dpo_service.train.policy import load_model
    from dpo_service.train.ranks import Ranks
    from dpo_service.train.reference import ReferenceScorer, build_reference
    from dpo_service.train.rows import RowTable
    from dpo_service.train.step import TrainState, train_step

    run, losses, operations = run_spec(setting), [], []
    table = pa.table(columns)
    if setting.reference == "cached":
        table = ReferenceScorer(str(setting.model_dir), setting.precision, run.batch)(table)
    rows = RowTable(table)
    plan = BatchPlan(len(rows), setting.batch, 1, None, False, 0, rows.lengths)
    policy = load_model(setting.model_dir)
    cost = Cost.of(policy)

    def frozen_copy() -> Any:
        return load_model(setting.model_dir).requires_grad_(False)

    reference = build_reference(setting.reference, policy, frozen_copy, setting.precision)
    state = TrainState(run, policy, reference, build_optimizer(policy, run.optim), Ranks(), setting.steps)
    for step in range(setting.steps):
        turns.wait()
        [shares] = plan.assign(step, 1, setting.batch, run.batch.micro_batch_tokens)
        batches = [collate(rows.take(share)) for share in shares]
        losses.append(float(train_step(state, step, batches, float(setting.batch)).sums["loss"]) / setting.batch)
        operations.append(sum(cost.of_pairs(batch.segments) for batch in batches))
    turns.wait(last=True)
    return {"losses": losses, "operations": operations}


def train_trl(setting: Setting, columns: Columns, turns: Turns) -> dict[str, Any]:
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
        precompute_ref_log_probs=setting.reference == "cached",
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
    return {"losses": [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]}


def multiply(setting: Setting, _columns: Columns, turns: Turns) -> dict[str, Any]:
    """What `torch.mm` reaches in the precision, operations a second, as often as there are steps."""
    import torch

    from dpo_service.train.flops import matrix_rate

    rates = []
    for _ in range(setting.steps):
        turns.wait()
        matrix_rate.cache_clear()
        rates.append(matrix_rate(torch.device("cpu"), getattr(torch, setting.precision)))
    turns.wait(last=True)
    return {"rates": rates}


def summary(setting: Setting, columns: Columns, parameters: int) -> dict[str, Any]:
    trainers = {"ours": train_ours, "TRL": train_trl}
    seconds, ends = by_turns(trainers, (setting, columns), steps=setting.steps, threads=setting.threads)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    pairs = zip(ends["ours"]["losses"], ends["TRL"]["losses"], strict=True)
    return {
        "unit": "seconds a step",
        "ours": medians["ours"],
        "peer": medians["TRL"],
        "ratio": medians["TRL"] / medians["ours"],
        "steps": {name: seconds[name] for name in ("ours", "TRL")},
        "peak_gigabytes": {name: ends[name]["peak"] for name in ("ours", "TRL")},
        "memory_ratio": ends["ours"]["peak"] / ends["TRL"]["peak"],
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
        "parameters": parameters,
        "mean_tokens": {name: statistics.mean(map(len, values)) for name, values in columns.items()},
        "setting": {name: value for name, value in asdict(setting).items() if name != "folder"},
    } | utilisation(replace(setting, steps=max(setting.steps, ALONE_STEPS)))


def utilisation(setting: Setting) -> dict[str, float]:
    """Each with the machine to itself: who takes turns with a process that gives memory back and takes it again is
    slowed by it, and so is `torch.mm`. The first two steps are not counted: they touch memory for the first time."""
    columns = make_rows(setting)

    def alone(trainer: Trainer) -> tuple[list[float], dict[str, Any]]:
        seconds, ends = by_turns({"it": trainer}, (setting, columns), steps=setting.steps, threads=setting.threads)
        return seconds["it"], ends["it"]

    _, mm = alone(multiply)
    seconds, ours = alone(train_ours)
    rate = statistics.median(mm["rates"][2:])
    reached = [count / time for count, time in zip(ours["operations"], seconds, strict=True)][2:]
    return {"mm_gigaflops": rate / 1e9, "utilisation": statistics.median(reached) / rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="short", help="short, long, or a preference file of pairs")
    parser.add_argument("--steps", type=int, default=5, help="at least 2; the first is not counted")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step; ours cuts them by its budget of tokens")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--reference", choices=("cached", "live"), default="cached")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--json", type=Path, default=results.DEFAULT)
    options = vars(parser.parse_args())
    path = options.pop("json")
    os.environ["OMP_NUM_THREADS"] = str(options["threads"])
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(**options, folder=Path(folder))
        found = summary(setting, make_rows(setting), make_model(setting.model_dir, setting.vocabulary))
    peaks = found["peak_gigabytes"]
    print(f"{'':6} {'s/step':>8} {'peak GB':>8}")
    for name, value in (("ours", found["ours"]), ("TRL", found["peer"])):
        print(f"{name:6} {value:8.2f} {peaks[name]:8.2f}")
    print(f"{found['ratio']:.2f} times as fast, {found['memory_ratio']:.2f} of the memory")
    print(f"losses differ by {found['largest_loss_difference']:.1e} at most")
    print(f"{found['utilisation']:.0%} of the {found['mm_gigaflops']:.0f} GFLOP/s of torch.mm")
    kind = setting.rows if setting.rows in LENGTHS else Path(setting.rows).stem
    name = f"step/{kind}/{setting.precision}/{setting.vocabulary}"
    results.record(path, name if setting.reference == "cached" else f"{name}/{setting.reference}", found)


if __name__ == "__main__":
    main()
