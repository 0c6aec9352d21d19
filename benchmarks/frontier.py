"""Reward against KL, after the first experiment of the DPO paper (arXiv:2305.18290, figure 2, left), in small.

    python -m benchmarks.frontier [--steps 60] [--every 15] [--batch 32] [--betas 0.05 0.1 0.3 1]

    base       a small Llama, supervised on reviews (reviews.py), which is also every run's reference
    offline    DPO and IPO (its sum form) on pairs of the base's own answers, two to a prompt, judged by the reward
    online     the same loss as DPO on as many pairs, of the policy's own answers, sampled one step ahead at most
    points     every so many steps of every run, for several betas: held-out prompts are sampled, and
               reward = mean score, KL = mean of log p(answer) - log p_base(answer), in nats an answer

The dashed line is the best that any policy can do, if the base says what it was taught. All runs go through the
service's one training loop, one vLLM engine and its weight sync.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks import results, reviews
from benchmarks.sampled import Kept, Told, prompt_columns, sampler_process, train_on_samples, write_dataset
from benchmarks.workload import Setting, run_spec
from dpo_service.demo import model as demo
from dpo_service.specs.loss import LossSpec
from dpo_service.specs.method import ReferenceSpec
from dpo_service.specs.optim import OptimSpec
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.run import OnlineSpec, RunSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from dpo_service.storage.store import Store

PNG = Path(__file__).parent.parent / "docs" / "frontier.png"
BETAS = (0.05, 0.1, 0.3, 1.0)
METHODS = ("dpo", "ipo", "online")
BUDGETS = (2.0, 4.0, 8.0)
"""Nats at which the methods are compared in words."""
SUPERVISED_BATCH = 32
SAMPLERS = SamplerSpec(max_num_seqs=64, max_model_len=96)


@dataclass(frozen=True)
class Plan:
    supervised_rows: int = 9600
    supervised_rate: float = 2e-3
    rate: float = 1e-4
    steps: int = 60
    every: int = 15
    """Steps between two points."""
    batch: int = 32
    held_out: int = 96
    answers: int = 4
    """To a held-out prompt, for a point."""
    betas: tuple[float, ...] = BETAS
    seed: int = 0

    @property
    def prompts(self) -> int:
        """To train on: some give no pair, since both answers are worth the same."""
        return int(self.steps * self.batch * 1.5)


@dataclass(frozen=True)
class Point:
    method: str
    beta: float
    step: int
    reward: float
    kl: float


class Bench:
    """The base model, the prompts, and what evaluates a policy: the same for all runs."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.plan, self.store, self.model_dir = plan, Store(folder / "store"), folder / "base"
        texts = reviews.make(plan.supervised_rows + plan.prompts + plan.held_out, plan.seed)
        demo.make_base_model(folder / "random", (" ".join(row) for row in texts))
        rows = reviews.encode(folder / "random", texts)
        self.supervised, rows = rows[: plan.supervised_rows], rows[plan.supervised_rows :]
        self.prompts, self.held_out = rows[: plan.prompts], rows[plan.prompts :]
        self.pairs: dict[str, list[Any]] = {}

    def run(self, job_id: str, model_dir: Path, steps: int, **changes: Any) -> RunSpec:
        run = run_spec(Setting("short", steps, self.plan.batch, "float32", "cached", 1, demo.VOCABULARY, model_dir))
        source = run.model.model_copy(update={"path": str(model_dir)})
        return run.model_copy(update={"job_id": job_id, "model": source, "keep_checkpoints": 100, **changes})

    def make_base(self) -> None:
        """The supervised base, from the random model."""
        from dpo_service.checkpoint.format import digest_of
        from dpo_service.train.loop import train

        random_dir, plan, rows = self.model_dir.with_name("random"), self.plan, self.supervised
        steps = max(1, len(rows) // SUPERVISED_BATCH)
        run = self.run(
            "supervised",
            random_dir,
            steps,
            method="supervised",
            loss=LossSpec(name="sft"),
            reference=ReferenceSpec(mode="none"),
            optim=OptimSpec(learning_rate=plan.supervised_rate, weight_decay=0.0),
        )
        columns = _columns(prompt=[row.prompt for row in rows], answer=[row.answer for row in rows])
        changes = {
            "data": run.data.model_copy(update={"rows": "answers"}),
            "batch": run.batch.model_copy(
                update={"batch_size": SUPERVISED_BATCH, "micro_batch_size": SUPERVISED_BATCH}
            ),
        }
        run = run.model_copy(update=changes)
        dataset = write_dataset(self.store, "supervised", "answers", columns, batch=SUPERVISED_BATCH, steps=steps)
        train(run, dataset, random_dir, store=self.store, base_digest=digest_of(random_dir), reports=Told())
        [last] = _checkpoints(self.store, "supervised")[-1:]
        shutil.copytree(last.model, self.model_dir)

    def prompt_rows(self, rows: Sequence[reviews.Encoded]) -> list[Any]:
        from dpo_service.online.prompts import PromptRow

        return [PromptRow(index, tuple(row.prompt), row.text, None, {}) for index, row in enumerate(rows)]

    def evaluate(self, sampler: Kept, rows: Sequence[reviews.Encoded], n: int) -> Any:
        """An `Evaluation` of what the sampler now holds."""
        from dpo_service.online.evaluation import Question, evaluate
        from dpo_service.online.judges.rules import RulesJudge
        from dpo_service.rows.template import Tokenizer

        decode = partial(Tokenizer.load(self.model_dir).decode, special_tokens=False)
        options = SamplingSpec(n=n, max_tokens=reviews.ANSWER_ROOM)
        question = Question(options, self.plan.seed, decode)
        return asyncio.run(evaluate(sampler, RulesJudge(reviews.judge()), self.prompt_rows(rows), question))

    def make_pairs(self, sampler: Kept) -> None:
        """The offline runs' pairs: of each prompt's two answers the better against the other."""
        made = self.evaluate(sampler, self.prompts, 2).answers
        compared = [(one, other) for one, other in zip(made[::2], made[1::2], strict=True) if one.score != other.score]
        wanted = self.plan.steps * self.plan.batch
        if len(compared) < wanted:
            raise SystemExit(f"only {len(compared)} of {wanted} prompts gave a pair: the base does not know the task")
        ranked = [sorted(pair, key=lambda one: one.score, reverse=True) for pair in compared[:wanted]]
        self.pairs = _columns(
            prompt=[list(chosen.prompt.token_ids) for chosen, _ in ranked],
            chosen=[list(chosen.sample.token_ids) for chosen, _ in ranked],
            rejected=[list(rejected.sample.token_ids) for _, rejected in ranked],
        )

    def train_offline(self, method: str, beta: float) -> str:
        from dpo_service.checkpoint.format import digest_of
        from dpo_service.train.loop import train
        from dpo_service.train.reference import ReferenceScorer

        plan, job_id = self.plan, f"{method}-{beta}"
        loss = LossSpec(name="ipo", beta=beta, length_normalize=False) if method == "ipo" else _dpo_loss(beta)
        run = self.run(job_id, self.model_dir, plan.steps, **self._options(), method=method, loss=loss)
        digest = digest_of(self.model_dir)
        dataset = write_dataset(
            self.store,
            job_id,
            "pairs",
            self.pairs,
            batch=plan.batch,
            steps=plan.steps,
            score=ReferenceScorer(str(self.model_dir), "float32", run.batch),
            reference_digest=digest,
        )
        train(run, dataset, self.model_dir, store=self.store, base_digest=digest, reports=Told())
        return job_id

    def train_online(self, beta: float, sampler: Kept) -> str:
        plan, job_id = self.plan, f"online-{beta}"
        online = OnlineSpec(
            source="online",
            sampling=SamplingSpec(n=2, max_tokens=reviews.ANSWER_ROOM),
            samplers=SAMPLERS,
            judge=reviews.judge(),
            pairing=PairingSpec(),
            sync="step",
            staleness=1,
        )
        options = self._options() | {"loss": _dpo_loss(beta), "reference": ReferenceSpec(mode="live")}
        run = self.run(job_id, self.model_dir, plan.steps, **options, method="online", online=online)
        columns = prompt_columns([row.text for row in self.prompts], [row.prompt for row in self.prompts])
        dataset = write_dataset(self.store, job_id, "prompts", columns, batch=plan.batch, steps=plan.steps)
        train_on_samples(run, dataset, self.store, self.model_dir, sampler, Told())
        return job_id

    def _options(self) -> dict[str, Any]:
        optim = OptimSpec(learning_rate=self.plan.rate, lr_schedule="constant", weight_decay=0.0)
        return {"optim": optim, "save_every_steps": self.plan.every}

    def points(self, method: str, beta: float, job_id: str, sampler: Kept) -> list[Point]:
        """A point for every checkpoint of a run; they are removed."""
        found = []
        for checkpoint in _checkpoints(self.store, job_id):
            reward, kl = self.measure(checkpoint.model, checkpoint.manifest.step, sampler)
            found.append(Point(method, beta, checkpoint.manifest.step, reward, kl))
        shutil.rmtree(self.store.path(f"jobs/{job_id}"))
        return found

    def measure(self, model_dir: Path, version: int, sampler: Kept) -> tuple[float, float]:
        """Reward and KL of the policy in `model_dir`."""
        from dpo_service.online.divergence import divergence
        from dpo_service.online.weights import WeightsFolder
        from dpo_service.train.policy import load_model, merged_state
        from dpo_service.train.ranks import Ranks
        from dpo_service.train.reference import build_reference

        policy = load_model(model_dir)
        folder = WeightsFolder(sum(p.numel() * p.element_size() for p in policy.parameters()))
        asyncio.run(sampler.sync(folder.publish(policy, merged_state(policy), version, "float32")))
        folder.remove()
        made = self.evaluate(sampler, self.held_out, self.plan.answers)
        reference = build_reference("live", policy, lambda: load_model(self.model_dir), "float32")
        batch = self.run("evaluation", self.model_dir, 1).batch
        return made.reward, divergence(policy, reference, made.answers, batch, Ranks(), "float32")["valid/kl"]


def _dpo_loss(beta: float) -> LossSpec:
    return LossSpec(name="sigmoid", beta=beta)


def _columns(**columns: list[list[int]]) -> dict[str, list[Any]]:
    count = len(columns["prompt"])
    return {"index": list(range(count)), "truncated": [False] * count, **columns}


def _checkpoints(store: Store, job_id: str) -> list[Any]:
    from dpo_service.checkpoint.load import opened, step_directories

    steps = [int(directory.name.removeprefix("step-")) for directory in step_directories(store, job_id)]
    return [opened(store, job_id, step) for step in steps]


def best_line() -> list[tuple[float, float]]:
    return [reviews.best(tilt / 20) for tilt in range(400)]


def reward_within(points: Sequence[tuple[float, float]], budget: float) -> float:
    """The highest reward of a (KL, reward) whose KL is at most `budget`."""
    return max((reward for kl, reward in points if kl <= budget), default=0.0)


def measure(bench: Bench, sampler: Kept) -> dict[str, Any]:
    plan, points = bench.plan, list[Point]()
    zero = (0.0, bench.evaluate(sampler, bench.held_out, plan.answers).reward)
    bench.make_pairs(sampler)
    for beta in plan.betas:
        for method in METHODS:
            started = time.perf_counter()
            job_id = bench.train_online(beta, sampler) if method == "online" else bench.train_offline(method, beta)
            trained = time.perf_counter() - started
            points += bench.points(method, beta, job_id, sampler)
            last, took = points[-1], time.perf_counter() - started
            print(
                f"{method:6} beta {beta:<5} reward {last.reward:.3f} KL {last.kl:6.3f}   {trained:.0f} of {took:.0f} s",
                flush=True,
            )
    curves = {name: [zero, *((one.kl, one.reward) for one in points if one.method == name)] for name in METHODS}
    curves["best"] = best_line()
    return {
        "unit": "reward from 0 to 1",
        "base_reward": zero[1],
        "reward_within": {
            f"{budget:g}": {name: reward_within(curve, budget) for name, curve in curves.items()} for budget in BUDGETS
        },
        "points": [asdict(point) for point in points],
        "plan": asdict(plan),
    }


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    colours = {"dpo": "tab:blue", "ipo": "tab:green", "online": "tab:red"}
    names = {"dpo": "DPO", "ipo": "IPO", "online": "online DPO"}
    markers = dict(zip(found["plan"]["betas"], "osD^v<>", strict=False))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(*zip(*best_line(), strict=True), "--", color="grey", label="best possible")
    for method in METHODS:
        for beta, marker in markers.items():
            run = [one for one in found["points"] if (one["method"], one["beta"]) == (method, beta)]
            x, y = [0.0, *(one["kl"] for one in run)], [found["base_reward"], *(one["reward"] for one in run)]
            axes.plot(x, y, marker + "-", color=colours[method], markersize=4, linewidth=0.7, alpha=0.8)
        axes.plot([], [], color=colours[method], label=names[method])
    for beta, marker in markers.items():
        axes.plot([], [], marker, color="black", markersize=4, label=f"β = {beta:g}")
    axes.set_xlabel("KL(policy || base), nats an answer")
    axes.set_ylabel("reward on held-out prompts")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of every run")
    parser.add_argument("--every", type=int, default=Plan.every, help="steps between two points")
    parser.add_argument("--batch", type=int, default=Plan.batch, help="pairs a step")
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--png", type=Path, default=PNG)
    parser.add_argument("--json", type=Path, default=results.DEFAULT)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    plan = Plan(steps=options.steps, every=options.every, batch=options.batch, betas=tuple(options.betas))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), plan)
        bench.make_base()
        print(f"the base is there after {time.perf_counter() - started:.0f} s", flush=True)
        with sampler_process(SAMPLERS, bench.model_dir) as sampler:
            found = measure(bench, sampler)
    found["minutes"] = (time.perf_counter() - started) / 60
    for budget, rewards in found["reward_within"].items():
        print(f"within {budget} nats: " + ", ".join(f"{name} {reward:.3f}" for name, reward in rewards.items()))
    print(f"the base has {found['base_reward']:.3f}; {found['minutes']:.0f} minutes in all")
    draw(found, options.png)
    results.record(options.json, "frontier", found)


if __name__ == "__main__":
    main()
