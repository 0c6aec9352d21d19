"""The core of each CPU benchmark runs at a tiny size, so that none is found broken when figures are wanted."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from benchmarks import ablation, checkpoint, frontier, overlap, pipeline, plan_memory, results, reviews, scaling, step
from benchmarks.sampled import Kept
from benchmarks.workload import Setting, make_model, make_rows
from dpo_service.online.fake_sampler import FakeSampler
from dpo_service.online.judges.port import Answer, JudgeRequest
from dpo_service.online.judges.rules import RulesJudge
from dpo_service.online.port import Sample


class Turns:
    """Never waits."""

    def __init__(self):
        self.taken = 0

    def wait(self, *, last=False):
        self.taken += not last


@pytest.fixture
def setting(tmp_path):
    made = Setting("short", 2, 2, "float32", "cached", 1, 300, tmp_path)
    make_model(made.model_dir, made.vocabulary, layers=1, hidden=128)
    return made


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_step(setting, reference):
    setting, turns = Setting(**vars(setting) | {"reference": reference}), Turns()
    said = step.train_ours(setting, make_rows(setting), turns)
    assert turns.taken == len(said["operations"]) == 2
    assert said["losses"][0] == pytest.approx(math.log(2), abs=1e-5)


def test_ablation(setting):
    found = ablation.measure(setting)
    assert list(found) == ["plain", "cached", "restricted", "chunked", "packed", "shared"]
    plain, *others = (entry["loss"] for entry in found.values())
    assert plain == pytest.approx(math.log(2)), "its reference is itself"
    assert others == pytest.approx([others[0]] * 5, rel=1e-4)


def test_checkpoint(setting):
    found = checkpoint.measure(checkpoint.Bench(setting, make_rows(setting)), 1)
    assert list(found["blocks"]) == ["none", "ours", "torch.save"]
    assert found["loop_stands_still_seconds"]["ours"] > 0
    assert (setting.folder / "peer.pt").stat().st_size > 0
    assert list((setting.folder / "store").rglob("model.safetensors")), "ours is saved too"


def test_scaling(setting):
    turns = Turns()
    assert len(scaling.one_worker(setting, make_rows(setting), turns)["losses"]) == turns.taken == 2


def test_pipeline_rows(setting, tmp_path):
    pipeline.write_file(tmp_path / "rows.jsonl", setting)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4


def test_plan_memory(tmp_path, monkeypatch, capsys):
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
    monkeypatch.setitem(plan_memory.MODELS, "tiny", sizes)
    case = plan_memory.Case("tiny", lora=4, reference="live", pairs=2)
    plan_memory.make_model(tmp_path, sizes)
    plan_memory.child(case, tmp_path)
    assert set(json.loads(capsys.readouterr().out)) == {"before", "net"}
    assert plan_memory.planned_bytes(case, tmp_path) > 0


def test_overlap(tmp_path):
    size = overlap.Size(pairs=2, prompt=8, answer=8, n=3, vocabulary=300, layers=1, hidden=128)
    make_model(tmp_path / "model", size.vocabulary, layers=size.layers, hidden=size.hidden)
    sampler = Kept(FakeSampler(overlap.sampler_spec(size), tmp_path / "model", 0), 0)
    size, runs = overlap.measure(tmp_path, size, sampler, rounds=1, steps=5)
    assert [(run.staleness, len(run.steps)) for run in runs] == [(0, 2), (1, 2)]
    steps = [pq.read_table(path)["versions"].to_pylist() for path in sorted(tmp_path.glob("store/jobs/0-0/samples/*"))]
    assert [{version for row in rows for version in row} for rows in steps] == [{0}, {1}, {2}, {3}, {4}]
    assert overlap.summary(size, runs)["size"]["n"] == size.n


def test_answers_are_as_many_as_balance_training():
    size = overlap.balanced(overlap.Size(n=4), [overlap.Step(step=5.0, wait=2.0, sample=1.5, judge=0.5, sync=0.0)])
    assert size.n == 6


def test_overlap_compares_what_each_staleness_took():
    turns, ahead = overlap.Step(5.0, 3.0, 2.5, 0.5, 0.1), overlap.Step(3.2, 0.2, 2.8, 0.5, 0.1)
    found = overlap.summary(overlap.Size(), [overlap.Run(0, 0.5, [turns]), overlap.Run(1, 0.6, [ahead])])
    assert found["ratio"] == 5.0 / 3.2
    assert (found["longer"], found["sum"]) == (3.0, 5.0)
    assert found["load_before"] == [0.5, 0.6]


class Reviewer(FakeSampler):
    """Says reviews at random, whatever its weights are."""

    def __init__(self, model_dir):
        super().__init__(frontier.SAMPLERS, model_dir, 0)
        self._reviews = [row.answer for row in reviews.encode(model_dir, reviews.make(50))]

    def _answer(self, ids, seed, options):
        said = random.Random(seed).choice(self._reviews)
        return Sample(tuple(said), (-1.0,) * len(said), True, self._version)


def test_frontier(tmp_path, capsys):
    plan = frontier.Plan(supervised_rows=4, steps=1, every=1, batch=2, held_out=3, answers=1, betas=(0.1,))
    bench = frontier.Bench(tmp_path, plan)
    bench.make_base()
    found = frontier.measure(bench, Kept(Reviewer(bench.model_dir), 0))
    assert [(one["method"], one["step"]) for one in found["points"]] == [(name, 1) for name in frontier.METHODS]
    assert 0 < found["base_reward"] < 1
    assert all(math.isfinite(one["kl"]) for one in found["points"])
    frontier.draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_no_policy_is_better_than_the_best():
    """It has the least KL of all with its reward, so along the line KL grows by tilt * WORDS for a unit of reward."""
    kls, rewards = zip(*(reviews.best(tilt) for tilt in (0.0, 1.0, 1.001, 50.0)), strict=True)
    assert (kls[0], rewards[0]) == (0.0, 0.5)
    assert (kls[2] - kls[1]) / (rewards[2] - rewards[1]) == pytest.approx(1.0 * reviews.WORDS, rel=1e-3)
    assert rewards[3] == pytest.approx(1.0, abs=1e-4)
    assert kls[3] == pytest.approx(reviews.WORDS * math.log(len(reviews.GRADES)), rel=1e-3)


async def test_the_reward_is_the_mean_grade():
    said = ["superb, " * 7 + "vile", "plain, dull, broken, vile", "solid", "", "dull, superbly"]
    request = JudgeRequest("a prompt", tuple(Answer(text) for text in said))
    scores = (await RulesJudge(reviews.judge()).judge(request)).scores
    assert scores == pytest.approx((7 / 8, 0.75 / 8, 0.75 / 8, 0.0, 0.25 / 8))


def test_points_beyond_a_budget_do_not_count():
    assert frontier.reward_within([(0.0, 0.5), (0.9, 0.7), (1.1, 0.9)], 1.0) == 0.7


@pytest.mark.long
@pytest.mark.parametrize(
    "command",
    [
        "step --steps 2 --batch 2 --vocabulary 2000",
        "step --steps 2 --batch 2 --vocabulary 2000 --reference live",
        "ablation --rounds 1 --batch 2 --vocabulary 2000",
        "checkpoint --rounds 1 --batch 2 --every 1 --vocabulary 2000",
        "scaling --steps 2 --batch 2 --vocabulary 2000",
        "pipeline --pairs 64 --batch 16 --peer-pairs 16",
        "plan_memory",
        "weight_sync --skip-large",
        "overlap --rounds 1 --steps 5 --pairs 2",
        "frontier --steps 2 --every 2 --batch 4 --betas 0.1",
    ],
)
def test_the_command_writes_its_entry(command, tmp_path):
    """With the peers, in processes of their own."""
    name, *options = command.split()
    drawing = ["--png", str(tmp_path / "plot.png")] if name == "frontier" else []
    said = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *options, *drawing, "--json", str(tmp_path / "found.json")],
        cwd=results.DEFAULT.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-4000:]
    entries = json.loads((tmp_path / "found.json").read_text())
    assert all(entry["unit"] and entry["machine"] for entry in entries.values())
    assert {key.split("/")[0] for key in entries} == {name} | ({"sampling"} if name == "weight_sync" else set())
