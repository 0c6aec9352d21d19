"""Alarms over histories made for them; each is told once, until it has cleared."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from dpo_service.specs.run import OnlineSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from dpo_service.train import alarms
from dpo_service.train.alarms import Alarms, Settings, newest, trimmed
from dpo_service.train.journal import settings_of
from tests.unit.train.training_kit import Recorder, make_job, random_rows

SETTINGS = Settings(warmup_steps=10, max_grad_norm=1.0)


def window(step, *, pairs=32, displaced=0.2, margin=0.1, accuracy=0.7, grad_norm=0.5, slope=0.0, gap=4.0):
    """A window whose margins are `slope` times the length gap, plus noise that does not know it."""
    rng = np.random.default_rng(step)
    gap_P = gap + 10 * rng.standard_normal(pairs)
    margin_P = slope * (gap_P - gap) + 0.1 * rng.standard_normal(pairs)
    margin_P += margin - margin_P.mean()
    return {
        "step": float(step),
        "grad_norm": grad_norm,
        "rows": float(pairs),
        "rewards/chosen": 0.0,
        "rewards/rejected": -float(margin_P.sum()),
        "rewards/accuracies": accuracy * pairs,
        "displaced": displaced * pairs,
        "gap": float(gap_P.sum()),
        "gap_gap": float((gap_P**2).sum()),
        "margin_margin": float((margin_P**2).sum()),
        "gap_margin": float((gap_P * margin_P).sum()),
    }


def told(windows, settings=SETTINGS, watched=None):
    """What was told, as (step, name, over)."""
    watched = watched or Alarms(settings)
    return [(int(w["step"]), said.name, said.over) for w in windows for said in watched.see(w)]


def steps(*values, first=11):
    return list(enumerate(values, first))


def test_a_healthy_run_is_quiet():
    assert told(window(step, margin=0.01 * step, grad_norm=1.5 / step) for step in range(1, 100)) == []


def test_displacement_is_told_once_while_the_margin_grows_and_again_after_it_cleared():
    shares = [0.9] * 12 + [0.6] * 12 + [0.3] * 12 + [0.9] * 12
    windows = [window(step, displaced=share, margin=0.01 * step) for step, share in steps(*shares)]
    # five windows pooled: raised at 0.75, quiet at 0.6, over at 0.5, raised anew
    assert told(windows) == [
        (15, "displacement", False),
        (36, "displacement", True),
        (50, "displacement", False),
    ]


@pytest.mark.parametrize("margin", [lambda step: 0.5, lambda step: -0.1 * step, lambda step: -5 + 0.01 * step])
def test_lower_chosen_answers_without_a_growing_margin_are_no_displacement(margin):
    windows = [window(step, displaced=0.9, margin=margin(step)) for step in range(11, 40)]
    assert all(name != "displacement" for _, name, _ in told(windows))


def test_a_loss_that_means_to_lower_chosen_answers_is_not_warned_of_it():
    windows = [window(step, displaced=1.0, margin=0.01 * step) for step in range(11, 40)]
    assert told(windows, Settings(10, 1.0, lowers_chosen=True)) == []


@pytest.mark.parametrize(("slope", "kind"), [(0.05, "longer"), (-0.05, "shorter")])
def test_margins_that_go_with_length_are_told_with_what_was_seen(slope, kind):
    watched = Alarms(SETTINGS)
    [said] = [said for step in range(11, 40) for said in watched.see(window(step, slope=slope))]
    assert said.name == "length_exploitation"
    assert f"how much {kind} the chosen answer is (correlation {'-' * (slope < 0)}0.9" in said.text
    assert "length_penalty" in said.text
    [(step, name, over)] = told([window(step) for step in range(40, 60)], watched=watched)
    assert (name, over, 44 <= step <= 47) == ("length_exploitation", True, True)


def test_a_gradient_many_times_the_usual_is_told_and_over_when_it_is_back():
    norms = [2.0] * 12 + [50.0, 40.0, 10.0, 2.0, 2.0]
    windows = [window(step, grad_norm=norm) for step, norm in steps(*norms)]
    assert told(windows) == [(23, "exploding_gradients", False), (26, "exploding_gradients", True)]


def test_a_gradient_that_clipping_leaves_alone_is_no_explosion():
    assert told([window(step, grad_norm=norm) for step, norm in steps(*[1e-3] * 20, 0.5)]) == []


@pytest.mark.parametrize(("accuracy", "where"), [(0.51, "stuck at one half: 0.51"), (0.2, "below one half: 0.20")])
def test_accuracy_that_does_not_leave_one_half(accuracy, where):
    watched = Alarms(SETTINGS)
    early = [said for step in range(1, 20) for said in watched.see(window(step, accuracy=accuracy))]
    assert early == []  # of the ten windows it takes, none may be of the warmup
    [said] = watched.see(window(20, accuracy=accuracy))
    assert (said.name, where in said.text, said.over) == ("accuracy", True, False)
    later = [window(step, accuracy=value) for step, value in steps(*[0.57] * 10, *[0.65] * 10, first=21)]
    assert told(later, watched=watched) == [(34, "accuracy", True)]


def test_a_policy_that_is_trained_on_its_own_answers_need_not_rank_them():
    windows = [window(step, accuracy=0.5) for step in range(1, 60)]
    assert told(windows, dataclasses.replace(SETTINGS, follows_policy=True)) == []


@pytest.mark.parametrize(("sync", "follows"), [("step", True), ("never", False), (None, False)])
def test_only_samplers_that_get_every_step_follow_the_policy(tmp_path, model_dir, sync, follows):
    run = make_job(tmp_path, model_dir).run
    if sync is not None:
        sampled = OnlineSpec(source="online", sampling=SamplingSpec(), samplers=SamplerSpec(), sync=sync)
        run = run.model_copy(update={"online": sampled})
    assert settings_of(run, 10).follows_policy is follows


@pytest.mark.parametrize("sums", [{}, {"rewards/chosen": 0.1, "rewards/rejected": 0.2}])
def test_answers_that_are_not_pairs_have_gradients_only(sums):
    """Supervised ones, and those of KTO, which have rewards of either side but no margins."""
    quiet = [{"step": step, "grad_norm": 2.0, "rows": 64.0} | sums for step in range(1, 40)]
    assert told([*quiet, {"step": 40, "grad_norm": 50.0, "rows": 64.0} | sums]) == [(40, "exploding_gradients", False)]


def test_windows_are_pooled_until_they_hold_enough_pairs():
    history = [window(step, pairs=2) for step in range(1, 101)]
    assert len(newest(history, 64, 5)) == 32
    assert len(newest(history, 4, 5)) == 5
    assert newest(history, 400, 5) is None
    assert newest(history, 64, 5, after_step=69) is None
    assert newest(history, 64, 5, after_step=68)[0]["step"] == 69
    assert len(trimmed(history)) == 100
    assert len(trimmed([window(step, pairs=2) for step in range(1, 301)])) == 128
    assert len(trimmed([window(step, pairs=32) for step in range(1, 301)])) == alarms.KEPT
    assert len(trimmed([window(step, pairs=1) | {"rows": 0.1} for step in range(1, 901)])) == alarms.MOST_KEPT


def test_a_resumed_run_tells_what_the_unbroken_one_tells():
    windows = [window(step, displaced=0.9, margin=0.01 * step, accuracy=0.5) for step in range(5, 60)]
    whole = told(windows)
    assert {name for _, name, _ in whole} == {"displacement", "accuracy"}
    for cut in (3, 9, 15, 30):
        first, second = Alarms(SETTINGS), Alarms(SETTINGS)
        before = told(windows[:cut], watched=first)
        second.resume(json.loads(json.dumps(first.counters())))
        assert before + told(windows[cut:], watched=second) == whole


def test_training_too_fast_unlearns_the_chosen_answers_and_says_so_once(tmp_path, model_dir):
    """Random answers: the only way to a larger margin is to make both unlikely, the rejected one more."""
    recorded = Recorder()
    job = make_job(tmp_path, model_dir, rows=96, steps=20, batch_size=16, learning_rate=0.3, save_every_steps=6)
    with pytest.raises(KeyboardInterrupt):
        job.train(reports=recorded, stop=_interrupted_at(11))
    job.train(reports=recorded)
    names = [key.split(":")[1] for key in recorded.warnings]
    assert names.count("displacement") == 1
    text = next(text for key, text in recorded.warnings.items() if "displacement" in key)
    assert "rpo_alpha" in text
    assert recorded.values["train", 20]["logps/displaced_share"] > 0.75


def _interrupted_at(step):
    asked = iter(range(10**6))

    def stop():
        if next(asked) == step:
            raise KeyboardInterrupt
        return False

    return stop


def test_labels_drawn_at_random_leave_accuracy_at_one_half(tmp_path, model_dir):
    columns, recorded = random_rows(640), Recorder()
    make_job(
        tmp_path, model_dir, columns=columns, steps=20, batch_size=32, micro_batch_size=32, learning_rate=1e-7
    ).train(reports=recorded)
    assert any(key.startswith("alarm:accuracy:") for key in recorded.warnings)


def test_answers_told_apart_by_length_alone_are_told(tmp_path, model_dir):
    """Chosen answers are the longer ones, of the same tokens: what is learnt is length."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, (320, 2))
    columns = {
        "index": list(range(320)),
        "prompt": [[5, 6, 7]] * 320,
        "truncated": [False] * 320,
        "chosen": [[9] * int(max(pair)) for pair in lengths],
        "rejected": [[9] * int(min(pair)) for pair in lengths],
    }
    recorded = Recorder()
    make_job(
        tmp_path, model_dir, columns=columns, steps=20, batch_size=32, micro_batch_size=32, learning_rate=1e-3
    ).train(reports=recorded)
    assert any(key.startswith("alarm:length_exploitation:") for key in recorded.warnings)
    assert recorded.values["train", 20]["length/margin_correlation"] > 0.5
