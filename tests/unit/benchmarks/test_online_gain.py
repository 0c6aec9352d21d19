"""The benchmark of online against offline DPO: it runs at a tiny size, and its table says what was measured."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from benchmarks import online_gain, results
from benchmarks.online_gain import Ran, Seed, by_step, entry_of, measure, plot, rates_of, render, table
from benchmarks.sampled import Kept
from dpo_service.demo.words import NOUNS
from dpo_service.online.fake_sampler import FakeSampler
from dpo_service.online.port import Sample


class Lister(FakeSampler):
    """Says a random list, whatever its weights are, and keeps the versions it was given."""

    def __init__(self, seed):
        super().__init__(online_gain.SAMPLERS, seed.base_dir, 0)
        self._tokenizer, self.given = seed.tokenizer, []

    def _answer(self, ids, seed, options):
        rng = random.Random(seed)
        said = " " + ", ".join(rng.choice(NOUNS) for _ in range(rng.randint(1, 8))) + ".<|end|>"
        tokens = tuple(self._tokenizer.encode(said, add_special_tokens=False))
        return Sample(tokens, (-1.0,) * len(tokens), True, self._version)

    async def sync(self, weights):
        self.given.append(weights.version)
        return await super().sync(weights)


@pytest.fixture
def seed(tmp_path, monkeypatch):
    for name, size in {"N_SUPERVISED": 32, "N_PROMPTS": 64, "N_HELD_OUT": 4}.items():
        monkeypatch.setattr(online_gain, name, size)
    made = Seed(tmp_path, 5)
    made.make_base()
    return made


def test_both_arms_run_and_only_one_samples_from_its_policy(seed):
    sampler = Lister(seed)
    runs = measure([seed], {"online": (1e-4,), "offline": (1e-4,)}, 2, Kept(sampler, 0))
    assert [(run.arm, run.seed, sorted(run.score)) for run in runs] == [("online", 5, [0, 2]), ("offline", 5, [0, 2])]
    assert all(0 < score < 1 for run in runs for score in run.score.values())
    assert runs[0].score[0] == runs[1].score[0], "both begin with the same model"
    # Online: first weights, after step 1, to evaluate after step 2. Offline: first weights, and to evaluate.
    assert sampler.given == [0, 1, 2, 0, 2]


def runs():
    return [
        Ran(arm, seed, 1e-4, {0: 0.2, 16: last}, {0: 0.0, 16: 3.0}, 0.9)
        for arm, scores in {"online": (0.8, 0.7, 0.9), "offline": (0.6, 0.6, 0.6)}.items()
        for seed, last in enumerate(scores)
    ]


def test_the_entry_is_the_mean_of_the_last_scores_and_the_table_their_range():
    entry = json.loads(json.dumps(entry_of(runs(), 32)))
    assert (entry["ours"], entry["peer"]) == (pytest.approx(0.8), pytest.approx(0.6))
    assert "| 512 | 0.80 (0.70 to 0.90) | 0.60 (0.60 to 0.60) |" in table(entry)


def test_the_best_rates_are_compared():
    found = rates_of([*runs(), Ran("offline", 0, 4e-4, {0: 0.2, 16: 0.65}, {0: 0.0}, 0.9)])
    assert found["scores"] == {"online": {"0.0001": 0.9}, "offline": {"0.0001": 0.6, "0.0004": 0.65}}
    assert (found["ours"], found["peer"], found["steps"]) == (0.9, 0.65, 16)


def test_a_spread_is_over_runs_step_by_step():
    spread = by_step([{0: 0.0, 8: 0.5}, {0: 0.2, 8: 0.7}])[8]
    assert (spread.mean, spread.least, spread.most) == (pytest.approx(0.6), 0.5, 0.7)


def test_the_picture_is_drawn(tmp_path):
    plot(json.loads(json.dumps(entry_of(runs(), 32))), tmp_path / "online.png")
    assert (tmp_path / "online.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_holds_what_was_measured():
    page, entry = online_gain.README.read_text(), json.loads(results.DEFAULT.read_text())["online_gain"]
    assert render(page, entry) == page, "run python -m benchmarks.online_gain"
    assert online_gain.PNG.exists()


def test_the_rates_are_of_those_tried_and_offline_has_its_best():
    tried = json.loads(results.DEFAULT.read_text())["online_gain/rates"]["scores"]
    for arm, scores in tried.items():
        assert {float(rate) for rate in scores} == set(online_gain.RATES[arm])
    assert tried["offline"][f"{online_gain.CHOSEN['offline']:g}"] == max(tried["offline"].values())


@pytest.mark.long
def test_the_command_writes_its_entry(tmp_path):
    written = ["--json", str(tmp_path / "found.json"), "--png", str(tmp_path / "plot.png")]
    command = [sys.executable, "-m", "benchmarks.online_gain", "--seeds", "0", "--steps", "2", *written]
    said = subprocess.run(command, cwd=results.DEFAULT.parent.parent, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-4000:]
    entry = json.loads((tmp_path / "found.json").read_text())["online_gain"]
    assert [run["arm"] for run in entry["runs"]] == ["online", "offline"]
