"""The page of results says what was measured."""

import json

from benchmarks import results
from benchmarks.report import GPU_RESULTS, PAGE, render, render_gpu, table
from benchmarks.workload import Setting, make_rows


def test_the_page_holds_the_results_as_they_were_measured():
    page = PAGE.read_text()
    assert render(page, json.loads(results.DEFAULT.read_text())) == page, "run python -m benchmarks.report"


def test_the_page_holds_the_gpu_results_as_they_were_measured():
    page = PAGE.read_text()
    assert render_gpu(page, json.loads(GPU_RESULTS.read_text())) == page, "run python -m benchmarks.report"


def test_a_benchmark_is_one_row_with_its_figures():
    entry = {
        "ours": 1.0,
        "peer": 8.0,
        "ratio": 8.0,
        "unit": "seconds a step",
        "utilisation": 0.5,
        "mm_gigaflops": 300.0,
        "machine": "a machine",
        "versions": {"torch": "2.13.0"},
    }
    text = table({"step/short": entry})
    assert "| step/short | 1 | 8 | 8 | seconds a step | 50% of torch.mm's 300 GFLOP/s |" in text
    assert "a machine (torch 2.13.0)" in text


def test_online_benchmarks_say_what_they_compared():
    common = {"unit": "u", "machine": "m", "versions": {}}
    seconds = {"0": {"step": 4.0, "train": 1.9, "sample": 1.9, "judge": 0.1}, "1": {"step": 2.1}}
    within = {"1.0": {"dpo": 0.8, "online": 0.9}}
    text = table(
        {
            "overlap": common | {"longer": 2.0, "seconds": seconds},
            "frontier": common | {"base_reward": 0.5, "reward_within": within},
            "sampling": common | {"of_plain": 0.8, "sampler": 0.95},
        }
    )
    assert "a step takes 2.10 s; by turns sampling and judging take 2.00 s, training 1.90 s, both 4.00 s" in text
    assert "base 0.50; within 1.0 nats dpo 0.80, online 0.90" in text
    assert "80% of the peer without seeds and log-probabilities; our sampler without the curator 95%" in text


def test_rows_of_a_file_take_its_lengths(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 400, "chosen": "y" * 80, "rejected": "z" * 8000}) + "\n")
    setting = Setting(
        rows=str(path),
        steps=1,
        batch=2,
        precision="float32",
        reference="cached",
        threads=1,
        vocabulary=100,
        folder=tmp_path,
    )
    columns = make_rows(setting)
    assert [len(tokens) for tokens in columns["chosen"]] == [20, 20]
    assert [len(tokens) for tokens in columns["rejected"]] == [1023, 1023]
    assert [len(tokens) for tokens in columns["prompt"]] == [1, 1]
