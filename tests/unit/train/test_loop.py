"""Whole runs in one process: they learn, report, save, stop, and resume to the same bits."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_service.checkpoint.load import newest_valid
from dpo_service.checkpoint.state import read_counters
from dpo_service.errors import CheckpointError, NonFiniteLoss, TrainingError
from dpo_service.specs.adapter import LoraSpec
from dpo_service.specs.method import RefreshSpec
from dpo_service.storage import paths
from dpo_service.train import loop
from dpo_service.train.batch import collate
from dpo_service.train.logprobs import completion_logps
from dpo_service.train.policy import load_model
from dpo_service.train.rows import RowTable
from dpo_service.train.step import train_step
from tests.unit.train.training_kit import Recorder, build_model, make_job, random_rows, same, weights

MIX = {"weight": 0.8, "rpo_alpha": 1.0, "others": [{"name": "bco_pair", "weight": 0.2}]}
KINDS = {
    "dpo-cached": {},
    "dpo-live": {"reference": "live"},
    "dpo-smoothed": {"label_smoothing": 0.1},
    "sft": {"loss": "sft"},
    "kto": {"loss": "kto"},
    "bco": {"loss": "bco_pair"},
    "mix": {"loss_options": MIX},
    "kto-lora": {"loss": "kto", "reference": "live", "lora": LoraSpec(rank=4, dropout=0.1)},
    "lora": {"reference": "live", "lora": LoraSpec(rank=4, dropout=0.1)},
    "bfloat16": {"precision": "bfloat16"},
    "refresh-hard": {"reference": "live", "refresh": RefreshSpec(every_steps=2)},
    "refresh-soft": {"reference": "live", "refresh": RefreshSpec(every_steps=1, alpha=0.6), "precision": "bfloat16"},
    "refresh-lora": {
        "reference": "live",
        "refresh": RefreshSpec(every_steps=3, alpha=0.5),
        "lora": LoraSpec(rank=4, dropout=0.1),
    },
    "pure-bfloat16": {"precision": "pure_bfloat16", "reference": "live"},
    "8-bit": {"optimizer": "adamw_8bit"},
    "offloaded": {"optimizer": "adamw_offload", "precision": "pure_bfloat16", "reference": "live"},
}


class Killed(BaseException):
    pass


def killed_at(step):
    """A `stop` that dies where a SIGKILL would: between two steps, with nothing saved by it."""
    asked = iter(range(10**6))

    def stop():
        if next(asked) == step:
            raise Killed
        return False

    return stop


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path, model_dir, kind):
    options = {"save_every_steps": 2, "keep_checkpoints": 2, "steps": 6, **KINDS[kind]}
    whole = make_job(tmp_path / "whole", model_dir, **options)
    recorded = Recorder()
    outcome = whole.train(reports=recorded)
    assert outcome.steps == 6
    for step in (1, 3, 5):
        job = make_job(tmp_path / f"cut{step}", model_dir, **options)
        resumed = Recorder()
        with pytest.raises(Killed):
            job.train(stop=killed_at(step), reports=resumed)
        again = job.train(reports=resumed)
        assert resumed.losses() == recorded.losses()
        assert resumed.losses("eval") == recorded.losses("eval")
        assert resumed.references == recorded.references
        assert (again.steps, again.trained_tokens) == (outcome.steps, outcome.trained_tokens)
        for left, right in zip(weights(whole), weights(job), strict=True):
            assert same(left, right)


def test_killed_at_any_step_every_row_is_seen_once_an_epoch(tmp_path, model_dir, monkeypatch):
    """Rows are known by their prompt, one token that is nowhere else."""
    columns = random_rows(32)
    columns["prompt"] = [[4 + row] for row in range(32)]
    for name in ("chosen", "rejected"):
        columns[name] = [[40 + token % 200 for token in ids] for ids in columns[name]]
    trained: dict[int, list[int]] = {}

    def recording(state, step, batches, divisor):
        rows = [int(id) - 4 for batch in batches for id in batch.input_ids_BL.flatten() if 4 <= id < 36]
        assert trained.setdefault(step, rows) == rows
        return train_step(state, step, batches, divisor)

    monkeypatch.setattr(loop, "train_step", recording)
    for killed in range(1, 8):
        job = make_job(tmp_path / str(killed), model_dir, columns=columns, validation=0, steps=8, save_every_steps=3)
        with pytest.raises(Killed):
            job.train(stop=killed_at(killed))
        assert list(trained) == list(range(killed))
        job.train()
        for epoch in (range(4), range(4, 8)):
            assert sorted(row for step in epoch for row in trained[step]) == list(range(32))
        trained.clear()


def test_dpo_learns_and_reports_what_trl_reports(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, steps=12, eval_every_steps=6, save_every_steps=4)
    recorded = Recorder()
    outcome = job.train(reports=recorded)
    first, last = recorded.values["train", 1], recorded.values["train", 12]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["loss"] < 0.55
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    named = {
        "loss rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected",
        "grad_norm learning_rate num_tokens epoch pairs_per_second tokens_per_second truncated_share padding_share",
        "logps/displaced_share length/gap length/margin_correlation mfu peak_memory_gib",
    }
    assert set(last) == set(" ".join(named).split())
    assert last["num_tokens"] == outcome.trained_tokens > 0
    assert last["epoch"] == 2.0
    assert sorted(step for split, step in recorded.values if split == "eval") == [0, 6, 12]
    assert recorded.values["eval", 0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert recorded.checkpoints == [4, 8, 12]
    assert outcome.checkpoint == paths.checkpoint_dir("j", 12)
    assert newest_valid(job.store, "j").manifest.digest == outcome.digest
    assert outcome.metrics["eval_loss"] == recorded.values["eval", 12]["loss"]


def test_untrained_policy_has_accuracy_one_half_under_a_live_reference(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, reference="live", steps=1)
    recorded = Recorder()
    job.train(reports=recorded)
    assert recorded.values["eval", 0]["rewards/accuracies"] == 0.5


def test_supervised_learns(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, loss="sft", steps=12)
    recorded = Recorder()
    job.train(reports=recorded)
    assert recorded.losses()[-1] < recorded.losses()[0] - 0.3
    last = recorded.values["train", 12]
    assert 0 <= last["mean_token_accuracy"] <= 1
    assert {"grad_norm", "learning_rate", "num_tokens", "tokens_per_second"} <= set(last)


def test_bco_measures_against_the_mean_of_the_steps_before(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, loss="bco_pair", loss_options={"beta": 0.5}, steps=4)
    recorded = Recorder()
    job.train(reports=recorded)
    assert recorded.values["train", 1]["loss"] == pytest.approx(2 * math.log(2), abs=1e-5)
    means = [
        values["rewards/chosen"] + values["rewards/rejected"]
        for (_, step), values in recorded.values.items()
        if _ == "train"
    ]
    total, count = read_counters(newest_valid(job.store, "j").state)["drift"]
    assert count == 4 * 2 * 8
    assert total / count == pytest.approx(sum(means) / 8 / 0.5, rel=1e-5)
    assert total != 0


def test_kto_learns_and_reports_what_trl_reports(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, loss="kto", loss_options={"beta": 0.5}, steps=12)
    recorded = Recorder()
    job.train(reports=recorded)
    first, last = recorded.values["train", 1], recorded.values["train", 12]
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    assert first["kl"] == pytest.approx(0.0, abs=1e-5)  # not 0 to the bit: the reference was computed in other batches
    assert last["loss"] < 0.45
    assert last["rewards/chosen"] > last["rewards/rejected"]
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert max(values["kl"] for values in recorded.values.values()) > 0
    named = "loss rewards/chosen rewards/rejected rewards/margins logps/chosen logps/rejected kl"
    assert set(named.split()) <= set(last)
    assert "answers_per_second" in last


def test_kto_measures_the_drift_over_the_whole_split(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, loss="kto", steps=4, validation=5)
    recorded = Recorder()
    job.train(reports=recorded)
    policy = load_model(newest_valid(job.store, "j").model)
    table = RowTable.load(job.store, job.dataset.validation)
    batch = collate(table.mismatched(range(len(table))))
    with torch.no_grad():
        drift = float((completion_logps(policy, batch).logps_S - batch.ref_chosen_P).mean())
    assert drift > 0
    assert recorded.values["eval", 4]["kl"] == pytest.approx(drift, rel=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "sft", "kto"])
def test_accumulation_equals_one_batch(tmp_path, model_dir, loss):
    whole, parts = Recorder(), Recorder()
    make_job(tmp_path / "a", model_dir, loss=loss, micro_batch_size=8).train(reports=whole)
    make_job(tmp_path / "b", model_dir, loss=loss, micro_batch_size=3).train(reports=parts)
    assert parts.losses() == pytest.approx(whole.losses(), rel=1e-5)
    norms = [recorded.values["train", step]["grad_norm"] for recorded in (whole, parts) for step in (1, 6)]
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_live_and_cached_reference_agree(tmp_path, model_dir, loss):
    live, cached = Recorder(), Recorder()
    make_job(tmp_path / "a", model_dir, loss=loss, reference="live").train(reports=live)
    make_job(tmp_path / "b", model_dir, loss=loss, reference="cached").train(reports=cached)
    assert live.losses() == pytest.approx(cached.losses(), rel=1e-5)


def test_logging_every_third_step_averages_over_all_rows(tmp_path, model_dir):
    every, third = Recorder(), Recorder()
    make_job(tmp_path / "a", model_dir).train(reports=every)
    make_job(tmp_path / "b", model_dir, logging_steps=3).train(reports=third)
    assert sorted(step for split, step in third.values if split == "train") == [3, 6]
    assert third.values["train", 3]["loss"] == pytest.approx(sum(every.losses()[:3]) / 3)


@pytest.mark.parametrize("kind", ["dpo-cached", "lora"])
def test_stopped_and_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path, model_dir, kind):
    """Stopped twice, each time where no checkpoint was due: no step is trained again, and none differs."""
    options = {"save_every_steps": 100, "eval_every_steps": 3, "keep_checkpoints": 2, **KINDS[kind]}
    whole, cut = make_job(tmp_path / "whole", model_dir, **options), make_job(tmp_path / "cut", model_dir, **options)
    unbroken, parts = Recorder(), [Recorder() for _ in range(3)]
    outcome = whole.train(reports=unbroken)
    for steps, recorded in zip((2, 3), parts[:2], strict=True):
        asked = iter([False] * steps + [True])
        assert cut.train(stop=lambda asked=asked: next(asked), reports=recorded).stopped
    assert (again := cut.train(reports=parts[2])).steps == outcome.steps == 6
    assert [loss for recorded in parts for loss in recorded.losses()] == unbroken.losses()
    assert again.trained_tokens == outcome.trained_tokens
    for left, right in zip(weights(whole), weights(cut), strict=True):
        assert same(left, right)


def test_stop_saves_where_it_stands_and_goes_on_from_there(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, save_every_steps=100)
    asked = iter([False, False, False, True])
    outcome = job.train(stop=lambda: next(asked))
    assert (outcome.stopped, outcome.steps) == (True, 3)
    assert newest_valid(job.store, "j").manifest.step == 3
    recorded = Recorder()
    assert job.train(reports=recorded).steps == 6
    assert recorded.messages[0] == "Training on 1 worker, resuming from step 3, 6 steps"


def test_stop_before_the_first_step_saves_nothing(tmp_path, model_dir):
    outcome = make_job(tmp_path, model_dir).train(stop=lambda: True)
    assert (outcome.stopped, outcome.steps, outcome.checkpoint) == (True, 0, None)


def test_finished_run_trains_nothing_again(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir)
    first = job.train()
    recorded = Recorder()
    assert job.train(reports=recorded) == first
    assert recorded.values == {}


def test_damaged_checkpoint_is_passed_over(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, save_every_steps=2)
    job.train()
    expected = weights(job)
    damaged = job.store.path(paths.checkpoint_dir("j", 6)) / "state" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    recorded = Recorder()
    job.train(reports=recorded)
    assert "resuming from step 4" in recorded.messages[0]
    assert all(same(left, right) for left, right in zip(weights(job), expected, strict=True))


def test_non_finite_loss_stops_before_the_weights_move(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, learning_rate=1.0, steps=20)
    job.run = job.run.model_copy(update={"optim": job.run.optim.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(NonFiniteLoss, match=r"step \d+: the (loss|gradient norm) is (nan|inf)"):
        job.train()


def test_other_base_model_is_refused_at_resume(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, reference="live")
    job.train()
    job.model_dir = build_model(tmp_path / "other", tied=False)
    with pytest.raises(CheckpointError, match="another base model"):
        job.train()


def test_cached_reference_of_another_model_is_refused(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir)
    job.dataset = job.dataset.model_copy(update={"reference_digest": "other"})
    with pytest.raises(TrainingError, match="another model"):
        job.train()


def test_cached_reference_that_is_not_there_is_refused(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, reference="live")
    job.run = job.run.model_copy(update={"reference": job.run.reference.model_copy(update={"mode": "cached"})})
    with pytest.raises(TrainingError, match="no reference log-probabilities"):
        job.train()


def test_about_ten_checkpoints_a_run_by_default(tmp_path, model_dir):
    recorded = Recorder()
    make_job(tmp_path, model_dir, steps=20, validation=0, keep_checkpoints=1).train(reports=recorded)
    assert recorded.checkpoints == list(range(2, 21, 2))
