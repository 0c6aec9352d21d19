"""What sampling ahead is worth: the steps of an online run at staleness 1 beside those at staleness 0.

    python -m benchmarks.overlap [--rounds 2] [--steps 10] [--pairs 16]

At staleness 0 sampling and training take turns: a step takes sample + judge + train. At staleness 1 the next step's
answers are sampled and judged while this one trains, and a step should take the longer of the two.

    trainer    one process, one thread: a 29M-parameter Llama in float32, its reference computed live, new weights every
               step; the curator and the judge (rules) are a thread of it
    sampler    vLLM in a Ray actor, one thread

How many answers a prompt gets is chosen first, so that sampling costs about what training does. Then the two run by
turns, from the same weights each time, and medians over all steps but the first two and the last of each run are taken.
`train` is all of a step that the trainer does not wait, handing out its weights included. A machine of two cores does
nothing else meanwhile, or the figures are of no use: its load before each run is told.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks import results
from benchmarks.sampled import Kept, Told, prompt_columns, sampler_process, train_on_samples, write_dataset
from benchmarks.workload import Setting, make_model, run_spec
from dpo_service.specs.judge import RulesJudgeSpec
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.run import OnlineSpec, RunSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from dpo_service.storage.store import Store

WARMUP = 2
"""Steps of a run that are not counted; nor is the last, beside which nothing is sampled."""
CALIBRATION = 5
"""Steps of the run that the number of answers is chosen by."""
MOST_ANSWERS = 16
RULES = [{"rule": "pattern", "pattern": rf"{ending:02d}\b", "weight": 2.0**ending} for ending in range(16)]
"""Each holds for about one of three answers of 48 random words, so hardly two answers are worth the same."""


@dataclass(frozen=True)
class Size:
    pairs: int = 16
    prompt: int = 32
    answer: int = 48
    n: int = 4
    """Answers to a prompt."""
    vocabulary: int = 8_000
    layers: int = 8
    hidden: int = 512


@dataclass(frozen=True)
class Step:
    """Seconds of one step."""

    step: float
    wait: float
    """Of it, that the trainer stood still."""
    sample: float
    judge: float
    sync: float

    @property
    def train(self) -> float:
        return self.step - self.wait


def sampler_spec(size: Size) -> SamplerSpec:
    return SamplerSpec(max_num_seqs=size.pairs * MOST_ANSWERS // 2, max_model_len=size.prompt + size.answer)


def online_run(folder: Path, size: Size, staleness: int, steps: int, job_id: str) -> RunSpec:
    run = run_spec(Setting("short", steps, size.pairs, "float32", "live", 1, size.vocabulary, folder))
    online = OnlineSpec(
        source="online",
        sampling=SamplingSpec(n=size.n, max_tokens=size.answer),
        samplers=sampler_spec(size),
        judge=RulesJudgeSpec.model_validate({"rules": RULES}),
        pairing=PairingSpec(cut_off="any"),  # answers of random weights do not end
        sync="step",
        staleness=staleness,
    )
    return run.model_copy(update={"method": "online", "online": online, "job_id": job_id})


def steps_of(told: Told) -> list[Step]:
    """The steps that count."""
    names = ("wait", "sample", "judge", "sync")
    seconds = [after - before for before, after in zip(told.at, told.at[1:], strict=False)]
    steps = [
        Step(took, **{name: values[f"online/{name}_seconds"] for name in names})
        for took, values in zip(seconds, told.steps[1:], strict=True)
    ]
    return steps[WARMUP - 1 : -1]


def run_once(folder: Path, size: Size, sampler: Kept, staleness: int, steps: int, name: str) -> list[Step]:
    run, told = online_run(folder, size, staleness, steps, name), Told()
    store, prompts = Store(folder / "store"), size.pairs * steps
    ids = [
        [4 + (7 * row + 3 * place) % (size.vocabulary - 4) for place in range(size.prompt)] for row in range(prompts)
    ]
    columns = prompt_columns([f"prompt {row}" for row in range(prompts)], ids)
    dataset = write_dataset(store, name, "prompts", columns, batch=size.pairs, steps=steps)
    train_on_samples(run, dataset, store, folder / "model", sampler, told)
    return steps_of(told)


def balanced(size: Size, measured: Sequence[Step]) -> Size:
    """As many answers to a prompt as take as long as training does."""
    making = statistics.median(step.sample + step.judge for step in measured)
    training = statistics.median(step.train for step in measured)
    return replace(size, n=min(MOST_ANSWERS, max(2, round(size.n * training / making))))


@dataclass(frozen=True)
class Run:
    staleness: int
    load: float
    """Of the machine in the minute before it."""
    steps: list[Step]


def measure(folder: Path, size: Size, sampler: Kept, *, rounds: int, steps: int) -> tuple[Size, list[Run]]:
    size = balanced(size, run_once(folder, size, sampler, 0, CALIBRATION, "calibration"))
    runs = []
    for turn in range(rounds):
        for staleness in (0, 1):
            load = os.getloadavg()[0]
            taken = run_once(folder, size, sampler, staleness, steps, f"{turn}-{staleness}")
            runs.append(Run(staleness, load, taken))
    return size, runs


def summary(size: Size, runs: Sequence[Run]) -> dict[str, Any]:
    def median(staleness: int, part: str) -> float:
        return statistics.median(
            getattr(step, part) for run in runs if run.staleness == staleness for step in run.steps
        )

    parts = ("step", "train", "sample", "judge", "sync", "wait")
    seconds = {str(staleness): {part: median(staleness, part) for part in parts} for staleness in (0, 1)}
    turns, ahead = seconds["0"], seconds["1"]
    making = turns["sample"] + turns["judge"]
    return {
        "unit": "steps an hour, the peer is staleness 0",
        "ours": 3600 / ahead["step"],
        "peer": 3600 / turns["step"],
        "ratio": turns["step"] / ahead["step"],
        "seconds": seconds,
        "sum": making + turns["train"],
        "longer": max(making, turns["train"]),
        "ratios": [
            statistics.median(step.step for step in first.steps) / statistics.median(step.step for step in second.steps)
            for first, second in zip(runs[::2], runs[1::2], strict=True)
        ],
        "load_before": [run.load for run in runs],
        "size": asdict(size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="of a run; at least 5")
    parser.add_argument("--pairs", type=int, default=16, help="a step")
    parser.add_argument("--json", type=Path, default=results.DEFAULT)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    size = Size(pairs=options.pairs)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder) / "model"
        parameters = make_model(model_dir, size.vocabulary, layers=size.layers, hidden=size.hidden)
        with sampler_process(sampler_spec(size), model_dir) as sampler:
            size, runs = measure(Path(folder), size, sampler, rounds=options.rounds, steps=options.steps)
    found = summary(size, runs) | {"parameters": parameters}
    print(f"{size.pairs} pairs a step, {size.n} answers of {size.answer} tokens to a prompt; median seconds")
    print(f"{'staleness':9} {'step':>6} {'train':>6} {'sample':>6} {'judge':>6} {'sync':>6} {'wait':>6}")
    for staleness, seconds in found["seconds"].items():
        print(f"{staleness:9} " + " ".join(f"{value:6.2f}" for value in seconds.values()))
    print(f"{found['ratio']:.2f} times the steps an hour; by round {', '.join(f'{r:.2f}' for r in found['ratios'])}")
    print(f"apart: longer {found['longer']:.2f} s, sum {found['sum']:.2f} s; load before: {found['load_before']}")
    results.record(options.json, "overlap", found)


if __name__ == "__main__":
    main()
