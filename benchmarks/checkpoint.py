"""What saving a checkpoint costs a run: ours beside torch.save of the same tensors, in the loop, and no saving at all.

    python -m benchmarks.checkpoint [--rows short|long] [--every 10] [--batch 8] [--rounds 3] [--threads 2]

Model and rows are those of benchmarks/workload.py. The three take blocks of `every` steps by turns, all on the same
rows: `none` only trains; `ours` saves first and ends when that checkpoint is durable, so that all the work the
thread took from the steps is counted; `torch.save` writes model and optimizer and syncs, then trains. A save's cost is
what a block took beyond `none`'s (medians), on the clock and in seconds of the process's cores; the latter hold on a
machine that does other things besides.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.workload import Columns, Setting, make_model, make_rows, options_of, run_spec, setting_of


class Bench:
    def __init__(self, setting: Setting, columns: Columns) -> None:
        import pyarrow as pa

        from dpo_service.checkpoint.format import digest_of
        from dpo_service.storage.store import Store
        from dpo_service.train.batch import collate
        from dpo_service.train.ranks import Ranks
        from dpo_service.train.rows import RowTable
        from dpo_service.train.saver import Saver
        from dpo_service.train.start import build_state

        run, digest = run_spec(setting), digest_of(setting.model_dir)
        self.setting, self.steps = setting, 0
        self.state = build_state(run, setting.model_dir, None, Ranks(), 1000, digest)
        self.saver = Saver(self.state, Store(setting.folder / "store"), setting.model_dir, digest, None, None)
        table = pa.table(columns)
        for name in ("ref_chosen", "ref_rejected"):
            table = table.append_column(name, pa.array([-100.0] * table.num_rows, pa.float32()))
        rows = RowTable(table)
        self.batches = [collate(rows.take(range(n, n + setting.batch))) for n in range(0, len(rows), setting.batch)]

    def train(self) -> None:
        from dpo_service.train.step import train_step

        for batch in self.batches:
            train_step(self.state, self.steps, [batch], float(self.setting.batch))
            self.steps += 1

    def none(self) -> float:
        self.train()
        return 0.0

    def ours(self) -> float:
        """Returns how long the loop stood still."""
        started = time.perf_counter()
        self.saver.save(self.steps, 0.0, {}, {})
        stalled = time.perf_counter() - started
        self.train()
        self.saver.settle()
        return stalled

    def peer(self) -> float:
        import torch

        started = time.perf_counter()
        path = self.setting.folder / "peer.pt"
        with path.open("wb") as file:
            torch.save({"model": self.state.policy.state_dict(), "optimizer": self.state.optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        stalled = time.perf_counter() - started
        self.train()
        return stalled


@dataclass(frozen=True)
class Block:
    wall: float
    cpu: float
    stalled: float


def timed(block: Callable[[], float]) -> Block:
    wall, cpu = time.perf_counter(), time.process_time()
    stalled = block()
    return Block(time.perf_counter() - wall, time.process_time() - cpu, stalled)


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    arms = {"none": bench.none, "ours": bench.ours, "torch.save": bench.peer}
    bench.train()  # not counted
    taken: dict[str, list[Block]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, block in arms.items():
            taken[name].append(timed(block))

    def median(name: str, of: str) -> float:
        return statistics.median(getattr(block, of) for block in taken[name])

    def cost(of: str) -> dict[str, float]:
        return {name: median(name, of) - median("none", of) for name in ("ours", "torch.save")}

    wall, cpu = cost("wall"), cost("cpu")
    return {
        "unit": "seconds a save adds to the run",
        "ours": wall["ours"],
        "peer": wall["torch.save"],
        "ratio": wall["torch.save"] / wall["ours"],
        "step_seconds": median("none", "wall") / len(bench.batches),
        "share_of_step_time": {name: seconds / median("none", "wall") for name, seconds in wall.items()},
        "share_of_core_time": {name: seconds / median("none", "cpu") for name, seconds in cpu.items()},
        "loop_stands_still_seconds": {name: median(name, "stalled") for name in wall},
        "blocks": {name: [asdict(block) for block in blocks] for name, blocks in taken.items()},
    }


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--every", type=int, default=10, help="steps from one save to the next")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(options, options.every, Path(folder))
        parameters = make_model(setting.model_dir, setting.vocabulary)
        found = measure(Bench(setting, make_rows(setting)), options.rounds)
    found |= {
        "parameters": parameters,
        "setting": {name: value for name, value in asdict(setting).items() if name != "folder"},
    }
    print(f"a step takes {found['step_seconds']:.2f} s; saving every {options.every} steps:")
    print(f"{'':11} {'s/save':>7} {'stall s':>8} {'of step time':>13} {'of core time':>13}")
    for name, seconds in (("ours", found["ours"]), ("torch.save", found["peer"])):
        columns = (
            found[key][name] for key in ("loop_stands_still_seconds", "share_of_step_time", "share_of_core_time")
        )
        stall, share, cores = columns
        print(f"{name:11} {seconds:7.2f} {stall:8.2f} {share:13.1%} {cores:13.1%}")
    results.record(options.json, f"checkpoint/{options.rows}/float32", found)


if __name__ == "__main__":
    main()
