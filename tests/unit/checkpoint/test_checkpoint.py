"""Checkpoints are whole or not there, damage is seen, and the newest whole one is found."""

from __future__ import annotations

import random

import pytest
import torch

from dpo_service.checkpoint.format import CheckpointFacts, digest_of, publish, verify
from dpo_service.checkpoint.load import newest_valid, step_directories
from dpo_service.checkpoint.retention import prune, ranked
from dpo_service.checkpoint.state import read_counters, read_tensors, write_counters, write_tensors
from dpo_service.errors import CheckpointError
from dpo_service.specs.eval import BestSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store

JOB = "ftjob-a"


def fill(directory):
    (directory / "model").mkdir()
    (directory / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (directory / "model" / "config.json").write_text('{"hidden_size": 4}')
    write_tensors(directory / "state" / "optimizer.safetensors", {"w": torch.arange(6.0)})
    write_counters(directory / "state", {"step": 1})


def save(store, step, **metrics):
    facts = CheckpointFacts(
        job_id=JOB, step=step, epoch=step / 10, base_model="tiny", base_digest="b" * 64, metrics=metrics
    )
    return publish(store, facts, fill)


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_published_checkpoint_verifies_and_names_its_model(tmp_path):
    store = Store(tmp_path)
    manifest = save(store, 3)
    found = newest_valid(store, JOB)
    assert found.manifest == manifest
    assert found.key == paths.checkpoint_dir(JOB, 3)
    assert manifest.model_digest == digest_of(found.model)
    assert {entry.path for entry in manifest.files} == {
        "model/model.safetensors",
        "model/config.json",
        "state/optimizer.safetensors",
        "state/counters.json",
    }


def test_no_checkpoint(tmp_path):
    assert newest_valid(Store(tmp_path), JOB) is None


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bit_is_seen_and_the_one_before_is_used(tmp_path, seed):
    store, rng = Store(tmp_path), random.Random(seed)
    save(store, 1)
    save(store, 2)
    victim = rng.choice(files_of(store.path(paths.checkpoint_dir(JOB, 2))))
    content = bytearray(victim.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    victim.write_bytes(content)
    with pytest.raises(CheckpointError):
        verify(store.path(paths.checkpoint_dir(JOB, 2)))
    assert newest_valid(store, JOB).manifest.step == 1


@pytest.mark.parametrize("seed", range(30))
def test_cut_short_or_missing_file_is_seen(tmp_path, seed):
    store, rng = Store(tmp_path), random.Random(seed)
    save(store, 1)
    save(store, 2)
    victim = rng.choice(files_of(store.path(paths.checkpoint_dir(JOB, 2))))
    if rng.random() < 0.3:
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: rng.randrange(victim.stat().st_size)])
    with pytest.raises(CheckpointError):
        verify(store.path(paths.checkpoint_dir(JOB, 2)))
    assert newest_valid(store, JOB).manifest.step == 1


def test_added_file_is_seen(tmp_path):
    store = Store(tmp_path)
    save(store, 1)
    directory = store.path(paths.checkpoint_dir(JOB, 1))
    (directory / "model" / "more.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not in the manifest"):
        verify(directory)


def test_crash_while_filling_leaves_the_old_state(tmp_path):
    store = Store(tmp_path)
    save(store, 1)

    def crash(directory):
        fill(directory)
        raise KeyboardInterrupt

    facts = CheckpointFacts(job_id=JOB, step=2, epoch=0.2, base_model="tiny", base_digest="b")
    with pytest.raises(KeyboardInterrupt):
        publish(store, facts, crash)
    assert newest_valid(store, JOB).manifest.step == 1
    assert not store.exists(paths.checkpoint_dir(JOB, 2))


def test_step_saved_again_replaces(tmp_path):
    store = Store(tmp_path)
    save(store, 1)
    directory = store.path(paths.checkpoint_dir(JOB, 1))
    (directory / "model" / "config.json").write_text("damaged")
    save(store, 1)
    assert verify(directory).step == 1


def test_prune_keeps_the_last_and_the_one_just_published(tmp_path):
    store = Store(tmp_path)
    for step in (5, 10, 15, 20):
        save(store, step)
    leftover = store.path(paths.checkpoints_dir(JOB)) / ".step-00000025.0a1b2c3d.tmp"
    leftover.mkdir()
    assert prune(store, JOB, keep=2, newest=20) == [5, 10]
    assert not leftover.exists()
    save(store, 12)
    assert prune(store, JOB, keep=2, newest=12) == []
    assert newest_valid(store, JOB).manifest.step == 20


def test_prune_keeps_what_is_in_use(tmp_path):
    store = Store(tmp_path)
    for step in (5, 10, 15):
        save(store, step)
    store.write(paths.keep_flag(paths.checkpoint_dir(JOB, 5)), b"")
    assert prune(store, JOB, keep=1, newest=15) == [10]
    assert [int(path.name[-8:]) for path in step_directories(store, JOB)] == [5, 15]


@pytest.mark.parametrize(("better", "kept"), [("lower", [2, 4, 5]), ("higher", [1, 3, 5])])
def test_prune_keeps_the_best_too(tmp_path, better, kept):
    store = Store(tmp_path)
    best = BestSpec(keep=2, metric="eval_loss", better=better, publish=False)
    for step, loss in enumerate([0.6, 0.2, 0.5, 0.3, 0.4], start=1):
        save(store, step, eval_loss=loss, eval_step=step)
        prune(store, JOB, keep=1, newest=step, best=best)
    assert [int(path.name[-8:]) for path in step_directories(store, JOB)] == kept


def test_an_evaluation_of_an_earlier_step_ranks_nothing(tmp_path):
    store, best = Store(tmp_path), BestSpec(keep=1, metric="eval_loss", better="lower", publish=True)
    save(store, 1, eval_loss=0.5, eval_step=1)
    save(store, 2, eval_loss=0.1, eval_step=1)
    save(store, 3)
    damaged = store.path(paths.checkpoint_dir(JOB, 1)) / "manifest.json"
    assert [made.step for made in ranked(store, JOB, best)] == [1]
    damaged.write_text("{}")
    assert ranked(store, JOB, best) == []


def test_state_comes_back_bit_for_bit(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.tensor(2.0)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    write_counters(tmp_path, {"loss": 0.1 + 0.2, "tokens": 2**60})
    back = read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert read_counters(tmp_path) == {"loss": 0.1 + 0.2, "tokens": 2**60}
