"""What a job costs around its steps: a 10,000-pair job through the stages a cluster runs, timed by its own reports.

    python -m benchmarks.pipeline [--pairs 10000] [--batch 64] [--peer-pairs 640]

    start      the job's process: imports, joining Ray
    data       reading, checking, tokenising, reference log-probabilities, plan, Parquet
    workers    Ray Train's start, imports, model, dataset
    steps      training, with reports and checkpoints, which are written beside it
    end        the last checkpoint, its digests, the result

The model is small (two layers of 128), so that what is around the steps shows. The peer is TRL's DPOTrainer doing what
our data stage does: tokenising the same rows and computing the reference's log-probabilities. It does so for the
first of them only, and its time is multiplied up.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.sampled import private_cluster
from benchmarks.workload import Setting, make_model, make_rows, run_spec

JOB = "ftjob-bench"


def write_file(path: Path, setting: Setting) -> None:
    """The rows as text, which the model's tokenizer makes the same tokens of again."""
    columns = make_rows(setting)
    with path.open("w") as file:
        for row in zip(*columns.values(), strict=True):
            texts = [" ".join(f"w{token}" for token in tokens) for tokens in row]
            named = dict(zip(columns, [texts[0] + " ", *texts[1:]], strict=True))
            file.write(json.dumps(named) + "\n")


def run_job(setting: Setting, pairs: int) -> dict[str, float]:
    """Seconds by stage."""
    from dpo_service.reports import read_spool, spool_files
    from dpo_service.specs.run import AttemptSpec
    from dpo_service.storage import paths
    from dpo_service.storage.store import Store

    store = Store(setting.folder / "store")
    store.path("files").mkdir(parents=True)
    write_file(store.path("files/f"), replace(setting, steps=pairs // setting.batch))
    run = run_spec(setting).model_copy(
        update={
            "job_id": JOB,
            "batch": run_spec(setting).batch.model_copy(update={"max_steps": None}),
            "logging_steps": 10,
        }
    )
    store.write_model(paths.attempt_spec(JOB, 1), AttemptSpec(run=run, attempt=1, report_url=None, report_token="-"))
    with private_cluster(setting.folder) as address:
        started = time.time()
        subprocess.run(
            [sys.executable, "-m", "dpo_service.runner", str(store.root), JOB, "1"],
            env=os.environ | {"RAY_ADDRESS": address},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ended = time.time()
    reports = [
        report
        for path in spool_files(store.path(paths.spool_dir(JOB, 1)))
        for batch, _ in read_spool(path)
        for report in batch
    ]
    first = min(report.created_at for report in reports)
    dataset = next(report.created_at for report in reports if report.type == "dataset")
    training = next(r.created_at for r in reports if r.type == "message" and r.message.startswith("Training on"))
    last = max(report.created_at for report in reports if report.type == "metrics")
    marks = [started, first, dataset, training, last, ended]
    names = ("start", "data", "workers", "steps", "end")
    return {name: marks[i + 1] - marks[i] for i, name in enumerate(names)}


def prepare_with_trl(setting: Setting, path: Path, pairs: int, said: Any) -> None:
    """Seconds that TRL takes to prepare the first `pairs` of the same file."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    started = time.perf_counter()
    cache = str(setting.folder / "hf")
    rows = load_dataset("json", data_files=str(path), split=f"train[:{pairs}]", cache_dir=cache)
    config = DPOConfig(
        output_dir=str(setting.folder / "trl"),
        per_device_train_batch_size=setting.batch,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=setting.batch,
        max_length=None,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(setting.model_dir, dtype="float32"),
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(setting.model_dir),
    )
    trainer.get_train_dataloader()
    said.send(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--peer-pairs", type=int, default=640)
    parser.add_argument("--json", type=Path, default=results.DEFAULT)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "2"
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            rows="short",
            steps=1,
            batch=options.batch,
            precision="float32",
            reference="cached",
            threads=2,
            vocabulary=8_000,
            folder=Path(folder),
        )
        make_model(setting.model_dir, setting.vocabulary, layers=2, hidden=128)
        stages = run_job(setting, options.pairs)
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        file = setting.folder / "store" / "files" / "f"
        some = min(options.peer_pairs, options.pairs)
        arguments = (setting, file.rename(file.with_suffix(".jsonl")), some, theirs)
        trl = context.Process(target=prepare_with_trl, args=arguments)
        trl.start()
        theirs.close()
        peer = pipe.recv() * options.pairs / some
        trl.join()
    around = sum(stages.values()) - stages["steps"]
    for name, seconds in stages.items():
        print(f"{name:8} {seconds:7.1f} s")
    print(f"{around:.1f} s around {stages['steps']:.1f} s of steps, for {options.pairs:,} pairs")
    print(
        f"TRL would prepare the same file in {peer:.1f} s, by its first {some} rows; ours took {stages['data']:.1f} s"
    )
    entry = {"unit": "seconds to prepare", "ours": stages["data"], "peer": peer, "ratio": peer / stages["data"]}
    entry |= {"stages": stages, "around_the_steps": around, "peer_pairs": some}
    results.record(options.json, f"pipeline/{options.pairs}", entry)


if __name__ == "__main__":
    main()
