"""What sampling from the policy gains: online DPO against DPO on as many pairs of the supervised base's answers.

    python -m benchmarks.online_gain [--seeds 0 1 2]     the curves, docs/online.png, and the table of the README
    python -m benchmarks.online_gain --rates             the learning rates that were tried, on a seed of their own

    base      the demo's model, supervised on lists that are too short (dpo_service/demo/lists.py); one a seed
    online    the job of configs/demo-online.yaml: the samplers get the policy after every step
    offline   the same job whose samplers keep the base: its pairs are what sampling once before it would give

Prompts, answers a prompt, judge, pairing, loss, beta, batch, steps and number of pairs are the same; the learning rate
is chosen for each (`RATES`). Both are scored on held-out prompts by the job's own evaluation, one answer a prompt.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks import results
from benchmarks.sampled import Kept, prompt_columns, sampler_process, train_on_samples, write_dataset
from dpo_service.cli.jobfile import load
from dpo_service.demo import corpus, lists
from dpo_service.demo import model as demo
from dpo_service.demo.plot import Labels, Line, draw
from dpo_service.jobs.choices import decide
from dpo_service.manifests.dataset import DatasetManifest
from dpo_service.registry.tables import File
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.eval import REWARD
from dpo_service.specs.job import JobSpec
from dpo_service.specs.run import ModelSource, RunSpec
from dpo_service.specs.sampling import SamplerSpec
from dpo_service.storage.store import Store

ROOT = Path(__file__).parent.parent
PNG, README = ROOT / "docs" / "online.png", ROOT / "README.md"
BEGIN, END = "<!-- online: begin -->\n", "<!-- online: end -->\n"
ARMS = {"online": "online DPO", "offline": "offline DPO"}
SYNC = {"online": "step", "offline": "never"}
RATES = {"online": (1e-4, 2e-4, 4e-4), "offline": (2e-4, 4e-4, 8e-4)}
CHOSEN = {"online": 2e-4, "offline": 2e-4}
"""Offline the one of `RATES` with the highest last score on `TUNING_SEED`. Online the second best: with the best, 4e-4,
the job of another seed came to answers that do not end, of which no pairs can be made."""
STEPS = 64
SEEDS, TUNING_SEED = (0, 1, 2), 100
N_SUPERVISED, N_PROMPTS, N_HELD_OUT = 8_000, 8_192, 256
JOB = JobSpec.model_validate(load(ROOT / "configs" / "demo-online.yaml") | {"validation_file": "file-held-out"})
SUPERVISED = JobSpec.model_validate(load(ROOT / "configs" / "demo-online-supervised.yaml"))
SAMPLERS = SamplerSpec(max_num_seqs=64, max_model_len=JOB.max_length)
Curve = dict[int, float]


@dataclass
class Told:
    """What a run says of its held-out prompts, and of those it sampled (`train.journal.Reports`)."""

    score: Curve = field(default_factory=dict)
    kl: Curve = field(default_factory=dict)
    valid: list[float] = field(default_factory=list)
    """Share of each step's prompts that gave a pair."""

    def metrics(self, split: str, step: int, values: Mapping[str, float], text: str) -> None:
        if split == "eval":
            self.score[step], self.kl[step] = values[REWARD], values["valid/kl"]
        elif "online/valid_share" in values:
            self.valid.append(values["online/valid_share"])

    def message(self, text: str, **_: Any) -> None: ...

    def checkpoint(self, *_: Any) -> None: ...

    def reference(self, *_: Any) -> None: ...

    def progress(self, *_: Any) -> None: ...


def run_of(job: JobSpec, model_dir: Path, job_id: str, rows: int) -> RunSpec:
    """`job` as the service's admission decides it."""
    file = File(name="rows.jsonl", key="files/rows")
    assert job.max_length is not None
    return decide(
        job,
        job_id=job_id,
        source=ModelSource(name="base", path=str(model_dir)),
        training=file,
        validation=file if job.validation_file else None,
        rows=rows,
        max_length=job.max_length,
        layer_width=demo.SHAPE["num_hidden_layers"] * demo.SHAPE["hidden_size"],
        router_coef=None,
        seed=job.seed or 0,
    )


class Seed:
    """One seed's task and base."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed, self.store = seed, Store(folder / f"seed-{seed}")
        self.lists = lists.generate(N_SUPERVISED, N_PROMPTS, N_HELD_OUT, seed)
        self.random_dir = self.store.path("random")
        words = corpus.generate(2_000, 100, 100).supervised
        demo.make_base_model(self.random_dir, (f"{prompt}\n{answer}" for prompt, answer in words), seed=seed)
        self.tokenizer = Tokenizer.load(self.random_dir)

    def make_base(self) -> None:
        """The job of configs/demo-online-supervised.yaml."""
        from dpo_service.checkpoint.format import digest_of
        from dpo_service.train.loop import train

        rows = [self._encoded(prompt, answer) for prompt, answer in self.lists.supervised]
        columns = {name: [row[name] for row in rows] for name in ("prompt", "answer")}
        columns |= {"index": list(range(len(rows))), "truncated": [False] * len(rows)}
        run = run_of(SUPERVISED.model_copy(update={"seed": self.seed}), self.random_dir, "base", len(rows))
        size = run.batch.batch_size
        steps = len(rows) // size
        dataset = write_dataset(self.store, "base", "answers", columns, batch=size, steps=steps)
        outcome = train(run, dataset, self.random_dir, store=self.store, base_digest=digest_of(self.random_dir))
        self.base_dir = self.store.path(f"{outcome.checkpoint}/model")

    def train(self, arm: str, rate: float, steps: int, sampler: Kept) -> Told:
        """The held-out scores of one arm."""
        job_id, told = f"{arm}-{rate:g}", Told()
        job = JOB.model_copy(update={"seed": self.seed, "learning_rate": rate, "max_steps": steps})
        run = run_of(job, self.base_dir, job_id, len(self.lists.prompts))
        assert run.online is not None
        online = run.online.model_copy(update={"sync": SYNC[arm]})
        dataset = self._prompts(job_id, run.batch.batch_size, steps)
        run = run.model_copy(update={"online": online})
        train_on_samples(run, dataset, self.store, self.base_dir, sampler, told)
        shutil.rmtree(self.store.path(f"jobs/{job_id}"))
        return told

    def _prompts(self, job_id: str, batch: int, steps: int) -> DatasetManifest:
        made = [
            write_dataset(self.store, f"{job_id}{part}", "prompts", self._columns(texts), batch=batch, steps=steps)
            for part, texts in (("", self.lists.prompts), ("-held-out", self.lists.held_out))
        ]
        return made[0].model_copy(update={"validation": made[1].train})

    def _columns(self, texts: Sequence[str]) -> dict[str, list[Any]]:
        return prompt_columns(texts, [self._encoded(text, None)["prompt"] for text in texts])

    def _encoded(self, prompt: str, answer: str | None) -> dict[str, list[int]]:
        from dpo_service.rows.encode import tokenise
        from dpo_service.rows.row import Row

        answers = () if answer is None else ([{"role": "assistant", "content": answer}],)
        asked, said = tokenise(Row(1, [{"role": "user", "content": prompt}], answers), self.tokenizer)
        return {"prompt": asked, "answer": said[0] if said else []}


@dataclass(frozen=True)
class Ran:
    """One run."""

    arm: str
    seed: int
    rate: float
    score: Curve
    kl: Curve
    valid: float
    """Share of the sampled prompts that gave a pair."""

    @property
    def sentence(self) -> str:
        scores = " ".join(f"{score:.2f}" for _, score in sorted(self.score.items()))
        return f"{self.arm:8} seed {self.seed} rate {self.rate:<7g} {scores}  KL {self.kl[max(self.kl)]:.1f}"


def measure(seeds: Sequence[Seed], rates: Mapping[str, Sequence[float]], steps: int, sampler: Kept) -> list[Ran]:
    """Every arm at each of its rates, for all seeds."""
    found = []
    for seed in seeds:
        for arm, some in rates.items():
            for rate in some:
                started = time.perf_counter()
                told = seed.train(arm, rate, steps, sampler)
                found.append(Ran(arm, seed.seed, rate, told.score, told.kl, statistics.fmean(told.valid)))
                print(f"{found[-1].sentence}  {time.perf_counter() - started:.0f} s", flush=True)
    return found


@dataclass(frozen=True)
class Spread:
    mean: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.least:.2f} to {self.most:.2f})"


def by_step(curves: Sequence[Curve]) -> dict[int, Spread]:
    """Over the runs, which were scored at the same steps."""
    columns = {step: [curve[step] for curve in curves] for step in sorted(curves[0])}
    return {step: Spread(statistics.fmean(some), min(some), max(some)) for step, some in columns.items()}


def rates_of(runs: Sequence[Ran]) -> dict[str, Any]:
    """What results.json keeps of the learning rates that were tried."""
    scores = {arm: {f"{run.rate:g}": run.score[max(run.score)] for run in runs if run.arm == arm} for arm in ARMS}
    best = {arm: max(some.values()) for arm, some in scores.items()}
    return {
        "ours": best["online"],
        "peer": best["offline"],
        "ratio": best["online"] / best["offline"],
        "unit": "the same at the best of the learning rates, on another seed",
        "steps": max(runs[0].score),
        "scores": scores,
    }


def entry_of(runs: Sequence[Ran], batch: int) -> dict[str, Any]:
    """What results.json keeps: every run, and the last scores' means."""
    last = {arm: by_step([run.score for run in runs if run.arm == arm]) for arm in ARMS}
    means = {arm: spreads[max(spreads)].mean for arm, spreads in last.items()}
    return {
        "ours": means["online"],
        "peer": means["offline"],
        "ratio": means["online"] / means["offline"],
        "unit": "held-out score of the verifier; the peer is offline DPO on as many pairs",
        "batch": batch,
        "runs": [asdict(run) for run in runs],
    }


def curves_of(entry: Mapping[str, Any]) -> dict[str, dict[int, Spread]]:
    """From an entry of results.json, by arm."""
    runs = entry["runs"]
    scores = {
        arm: [{int(step): score for step, score in run["score"].items()} for run in runs if run["arm"] == arm]
        for arm in ARMS
    }
    return {arm: by_step(curves) for arm, curves in scores.items()}


def plot(entry: Mapping[str, Any], path: Path) -> None:
    lines = [
        Line(
            ARMS[arm],
            tuple((step, spread.mean) for step, spread in curve.items()),
            tuple((step, spread.least, spread.most) for step, spread in curve.items()),
        )
        for arm, curve in curves_of(entry).items()
    ]
    seeds = len({run["seed"] for run in entry["runs"]})
    labels = Labels(f"Held-out score of the verifier: mean and range of {seeds} seeds", "steps of 32 pairs", "score")
    draw(path, lines, labels)


def table(entry: Mapping[str, Any]) -> str:
    """Of the README: the first score, those of every other evaluation, and the last."""
    curves = curves_of(entry)
    lines = [f"| pairs trained on | {' | '.join(ARMS.values())} |", "|--:|--:|--:|"]
    for step in curves["online"]:
        cells = " | ".join(str(curve[step]) for curve in curves.values())
        lines.append(f"| {step * entry['batch']:,} | {cells} |")
    return "\n".join(lines) + "\n"


def render(page: str, entry: Mapping[str, Any]) -> str:
    """`page` with the table of `entry` between its marks."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}{table(entry)}{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", action="store_true", help="try the learning rates, on a seed of their own")
    parser.add_argument("--json", type=Path, default=results.DEFAULT)
    parser.add_argument("--png", type=Path, default=PNG)
    options = parser.parse_args()
    rates = RATES if options.rates else {arm: (rate,) for arm, rate in CHOSEN.items()}
    with tempfile.TemporaryDirectory() as folder:
        seeds = [Seed(Path(folder), seed) for seed in ((TUNING_SEED,) if options.rates else options.seeds)]
        for seed in seeds:
            seed.make_base()
        with sampler_process(SAMPLERS, seeds[0].base_dir) as sampler:
            runs = measure(seeds, rates, options.steps, sampler)
    if options.rates:
        results.record(options.json, "online_gain/rates", rates_of(runs))
        return
    entry = entry_of(runs, JOB.method.hyperparameters.batch_size)
    results.record(options.json, "online_gain", entry)
    plot(entry, options.png)
    print(table(entry))
    if options.json == results.DEFAULT:
        README.write_text(render(README.read_text(), entry))


if __name__ == "__main__":
    main()
