"""The next step's rows are prepared meanwhile, and are the same ones."""

from __future__ import annotations

import threading

import pytest
import torch

from dpo_service.specs.resources import ResourceSpec
from dpo_service.train.feed import Feed
from dpo_service.train.ranks import Ranks
from tests.unit.train.training_kit import make_job


def feed_of(job, ranks=None):
    return Feed(job.run, job.dataset, job.store, ranks or Ranks())


def ids(batches):
    return [batch.input_ids_BL.tolist() for batch in batches]


def test_prepared_meanwhile_or_asked_for_out_of_order_it_is_the_same_step(tmp_path, model_dir):
    job = make_job(tmp_path, model_dir, reference="live", steps=6)
    ahead, fresh = feed_of(job), feed_of(job)
    in_order = [ids(ahead.batches(step)) for step in range(6)]
    assert [ids(fresh.batches(step)) for step in (5, 2, 4)] == [in_order[step] for step in (5, 2, 4)]
    for feed in (ahead, fresh):
        feed.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_the_next_step_is_prepared_without_being_asked_for(tmp_path, model_dir):
    feed = feed_of(make_job(tmp_path, model_dir, reference="live", steps=6))
    take, taken, prepared = feed.rows.take, [], threading.Event()

    def noted(rows):
        taken.extend(rows)
        if len(taken) == 16:  # two steps of 8
            prepared.set()
        return take(rows)

    feed.rows.take = noted
    feed.batches(0)
    assert prepared.wait(30)
    feed.close()
    assert sorted(taken[8:]) == sorted(feed.plan.rows(1))


def test_an_error_in_the_thread_reaches_the_loop(tmp_path, model_dir):
    feed = feed_of(make_job(tmp_path, model_dir, reference="live", steps=6))
    feed.batches(0)
    feed.rows.take = lambda rows: 1 / 0
    with pytest.raises(ZeroDivisionError):
        for step in (1, 2):  # the first may have been prepared before
            feed.batches(step)
    feed.close()


def test_a_micro_batch_keeps_to_its_tokens(tmp_path, model_dir):
    feed = feed_of(make_job(tmp_path, model_dir, reference="live", micro_batch_size=8, micro_batch_tokens=64))
    batches = feed.batches(0)
    assert len(batches) > 2
    assert sum(batch.rows for batch in batches) == 8
    assert all(batch.input_ids_BL.shape[1] <= 64 for batch in batches)
    feed.close()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_sharded_ranks_compute_equally_often(tmp_path, model_dir, strategy):
    """Three rows over two ranks, one a micro-batch: the second rank has one fewer."""
    options = {"batch_size": 3, "micro_batch_size": 1, "validation": 3, "reference": "live"}
    job = make_job(tmp_path, model_dir, resources=ResourceSpec(workers=2, strategy=strategy), **options)
    feeds = [feed_of(job, Ranks(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    for of in (lambda feed: feed.batches(0), lambda feed: list(feed.validation_batches())):
        first, second = sorted((of(feed) for feed in feeds), key=lambda got: -sum(not batch.blank for batch in got))
        assert [batch.blank for batch in first] == [False, False]
        assert [batch.blank for batch in second] == ([False, True] if strategy == "fsdp" else [False])
    for feed in feeds:
        feed.close()
