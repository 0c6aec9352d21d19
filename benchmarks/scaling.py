"""From one worker to two, a thread each: the same steps, the same batch, gradients summed over gloo.

    python -m benchmarks.scaling [--rows short] [--steps 5] [--batch 8]

One worker and two take their steps by turns. The peer is one worker; twice as fast would be perfect.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.turns import Turns, by_turns
from benchmarks.workload import LENGTHS, Columns, Setting, make_model, make_rows, run_spec


def _steps(setting: Setting, columns: Columns, rank: int, world: int, turns: Turns | None) -> dict[str, Any]:
    import numpy as np
    import pyarrow as pa

    from dpo_service.rows.plan import BatchPlan
    from dpo_service.train.batch import collate
    from dpo_service.train.optim import build_optimizer
    from dpo_service.train.policy import load_model
    from dpo_service.train.ranks import Ranks
    from dpo_service.train.reference import cached_reference
    from dpo_service.train.rows import RowTable
    from dpo_service.train.step import TrainState, train_step

    table = pa.table(columns)
    for name in ("ref_chosen", "ref_rejected"):
        table = table.append_column(name, pa.array(np.zeros(len(table)), pa.float32()))
    rows, run, ranks = RowTable(table), run_spec(setting), Ranks(rank, world)
    policy = load_model(setting.model_dir)
    plan = BatchPlan(len(rows), setting.batch, 1, None, False, 0, rows.lengths)
    state = TrainState(run, policy, cached_reference, build_optimizer(policy, run.optim), ranks, setting.steps)
    losses = []
    for step in range(setting.steps):
        if turns is not None:
            turns.wait()
        ranks.barrier()
        mine = plan.assign(step, world, setting.batch)[rank]
        batches = [collate(rows.take(micro)) for micro in mine if len(micro)]
        losses.append(float(train_step(state, step, batches, float(setting.batch)).sums["loss"]) / setting.batch)
    if turns is not None:
        turns.wait(last=True)
    return {"losses": losses}


def one_worker(setting: Setting, columns: Columns, turns: Turns) -> dict[str, Any]:
    return _steps(setting, columns, 0, 1, turns)


def two_workers(setting: Setting, columns: Columns, turns: Turns) -> dict[str, Any]:
    import torch.multiprocessing as mp

    store = setting.folder / "group"
    second = mp.get_context("spawn").Process(target=_second, args=(setting, columns, store))
    second.start()
    _join(store, 0)
    said = _steps(setting, columns, 0, 2, turns)
    second.join()
    return said


def _second(setting: Setting, columns: Columns, store: Path) -> None:
    import torch

    torch.set_num_threads(1)
    _join(store, 1)
    _steps(setting, columns, 1, 2, None)


def _join(store: Path, rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def measure(setting: Setting) -> dict[str, Any]:
    workers = {"one": one_worker, "two": two_workers}
    seconds, ends = by_turns(workers, (setting, make_rows(setting)), steps=setting.steps, threads=1)
    one, two = (statistics.median(values[1:]) for values in seconds.values())
    apart = max(abs(a - b) for a, b in zip(ends["one"]["losses"], ends["two"]["losses"], strict=True))
    return {
        "unit": "seconds a step",
        "ours": two,
        "peer": one,
        "ratio": one / two,
        "largest_loss_difference": apart,
        "steps": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", choices=LENGTHS, default="short")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--json", type=Path, default=results.DEFAULT)
    options = vars(parser.parse_args())
    path = options.pop("json")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(**options, precision="float32", reference="cached", threads=1, folder=Path(folder))
        make_model(setting.model_dir, setting.vocabulary)
        found = measure(setting)
    one, two = found["peer"], found["ours"]
    print(f"one worker {one:.2f} s a step, two {two:.2f} s: {one / two:.2f} times as fast, of 2")
    print(f"losses differ by {found['largest_loss_difference']:.1e} at most")
    results.record(path, f"scaling/{setting.rows}", found)


if __name__ == "__main__":
    main()
