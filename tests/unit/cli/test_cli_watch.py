"""What is learnt of a run, and how it is drawn."""

from __future__ import annotations

import time

from rich.console import Console

from dpo_service.cli.watch import Progress, draw, spark_line, summary


def metrics(step: int, split: str = "train", **values: float) -> dict:
    return {"type": "metrics", "data": {"step": step, "split": split, **values}}


def test_a_spark_line_rises_with_its_values_and_keeps_its_width():
    assert spark_line([]) == ""
    assert spark_line([0.0, 1.0]) == "▁█"
    assert spark_line([1.0] * 5) == "▁" * 5
    assert len(spark_line([float(n) for n in range(1000)], width=40)) == 40
    assert spark_line([float(n) for n in range(80)], width=8) == "▁▂▃▄▅▆▇█"


def test_progress_learns_from_events_and_from_the_job():
    progress = Progress("ftjob-1")
    progress.take({"type": "message", "message": "Training on 1 worker"})
    progress.take(metrics(0, "eval", **{"rewards/accuracies": 0.5}))
    progress.take(metrics(3, loss=0.6))
    progress.see({"status": "running", "dataset": {"total_steps": 9}, "estimated_finish": time.time() + 60})
    assert (progress.step, progress.total, progress.history["loss"], progress.message) == (
        3,
        9,
        [0.6],
        "Training on 1 worker",
    )
    assert progress.evals[0]["rewards/accuracies"] == 0.5
    assert 55 < progress.seconds_left <= 60


def test_a_paused_job_is_shown_as_paused_and_where_it_stands():
    progress = Progress("ftjob-1")
    running = {"stage": "train", "done": 3, "total": 8}
    progress.see({"status": "queued", "state": "paused", "progress": running, "estimated_finish": None})
    assert (progress.status, progress.total, progress.seconds_left) == ("paused", 8, None)


def test_an_ended_job_has_no_time_left():
    progress = Progress("ftjob-1")
    progress.see({"status": "succeeded", "estimated_finish": time.time() + 60})
    assert progress.seconds_left is None


def test_the_picture_shows_bar_numbers_and_evaluations():
    progress = Progress("ftjob-1")
    progress.see({"status": "running", "dataset": {"total_steps": 20}, "estimated_finish": None})
    values = {"rewards/margins": 0.25, "rewards/accuracies": 0.75, "pairs_per_second": 12.0}
    progress.take(metrics(10, loss=0.61, **values))
    progress.take(metrics(10, "eval", loss=0.6, **{"rewards/accuracies": 0.8}))
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(draw(progress, time.monotonic()))
    shown = console.export_text()
    for words in (
        "step 10/20",
        "loss 0.61",
        "reward margin 0.25",
        "accuracy 0.75",
        "pairs/s 12",
        "validation at step 10",
    ):
        assert words in shown


def shown(picture) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(picture)
    return console.export_text()


def test_a_warning_stays_in_the_picture_until_it_no_longer_holds():
    progress = Progress("ftjob-1")
    alarm = {"alarm": "displacement", "step": 8}
    progress.take({"type": "message", "level": "warn", "message": "Likelihood displacement: 90%", "data": alarm})
    progress.take({"type": "message", "level": "info", "message": "Checkpoint of step 9 saved", "data": {"step": 9}})
    assert "Warning: Likelihood displacement: 90%" in shown(draw(progress, time.monotonic()))
    progress.take({"type": "message", "level": "info", "message": "It no longer holds", "data": alarm})
    assert "Warning" not in shown(draw(progress, time.monotonic()))


def test_the_summary_has_every_metrics_way():
    progress = Progress("ftjob-1")
    for step, value in ((1, 0.5), (2, 0.75), (3, 0.25)):
        progress.take(metrics(step, **{"logps/displaced_share": value}))
    (line,) = [line for line in shown(summary(progress.history)).splitlines() if "displaced" in line]
    assert line.split() == ["logps/displaced_share", "0.5", "0.25", "0.25", "0.75", "▅█▁"]


def test_before_training_the_stage_is_shown():
    progress = Progress("ftjob-1")
    running = {"stage": "data", "done": 3, "total": 8}
    progress.see({"status": "running", "dataset": None, "estimated_finish": None, "progress": running})
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(draw(progress, time.monotonic()))
    assert "not training yet  data: 3/8" in console.export_text()
