"""The loop with samplers on GPUs, as far as a CPU goes (`device_kit`): whole weights sent from device to device, who
dies between and within transfers, and who sleeps when on a device that is shared."""

from __future__ import annotations

import pytest

from dpo_service.errors import SamplerLost, WeightsRefused
from dpo_service.online import device_export
from dpo_service.online.curator import Curator, CuratorPlan
from dpo_service.online.device_transfer import TransferBroken
from dpo_service.online.feed import OnlineFeed, OnlinePlan
from dpo_service.online.inprocess import InProcessCurator
from dpo_service.online.judges.metrics import Counted
from dpo_service.online.sources import Judged
from dpo_service.specs.method import RefreshSpec
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from dpo_service.train.ranks import Ranks
from tests.models import save_tiny_llama
from tests.unit.online.curator_kit import KeptSamples, SomePrompts
from tests.unit.online.device_kit import BOTH, Actor, Reached, pool_of, use_wires
from tests.unit.online.test_online_feed import SIZE, Likes, Reports, online_job, trained

pytest.importorskip("vllm")
OWN = SamplerSpec(gpus=1, samplers=2, dtype="float32", max_num_seqs=8)
SHARED = SamplerSpec(gpus=1, shares_device=True, dtype="float32", max_num_seqs=8)


@pytest.fixture
def reached(monkeypatch):
    made = Reached()
    monkeypatch.setattr(device_export, "ask_actors", made)
    return made


@pytest.fixture
def wires(monkeypatch):
    made = use_wires(monkeypatch)
    monkeypatch.setattr(device_export, "free_address", made.address)
    return made


class Watched(OnlineFeed):
    """Tells `seen` of each step before it is trained."""

    seen = staticmethod(lambda step: None)

    def batches(self, step):
        made = super().batches(step)
        self.seen(step)
        return made


def trained_on_devices(job, actors, reached, spec, *, seen=None, staleness=0, sync_every=1, kept=None, **options):
    total = job.run.batch.max_steps

    def make():
        import asyncio

        reached.loop = asyncio.get_running_loop()
        pool = pool_of(actors)
        curator = Curator(
            CuratorPlan(
                total, SIZE, seed=3, staleness=staleness, sync_every=sync_every, takes_turns=spec.shares_device
            ),
            SomePrompts(),
            pool,
            Judged(Counted(Likes()), PairingSpec(cut_off="any")),
            SamplingSpec(n=4, max_tokens=4),
            lambda ids: " ".join(map(str, ids)),
            kept,
        )
        pool.on_lacking = curator.lacking
        return curator

    with InProcessCurator(make, actors) as client:
        feed = Watched(client, OnlinePlan(2, total), job.run.batch, Ranks(), sync_every=sync_every, samplers=spec)
        if seen is not None:
            feed.seen = seen
        return job.train(feed=feed, **options)


def actors_of(spec, directory, wires):
    return [Actor(spec, directory, wires) for _ in range(spec.samplers)]


def gaps(reports):
    return [values["online/logp_gap"] for values in reports.told]


@pytest.mark.parametrize("spec", [OWN, SHARED], ids=["nccl", "ipc"])
def test_sent_weights_train_what_published_ones_do_to_the_bit(tmp_path, model_dir, reached, wires, spec):
    by_file = trained(online_job(tmp_path / "file", model_dir, steps=4))
    actors, reports = actors_of(spec, model_dir, wires), Reports()
    sent = trained_on_devices(online_job(tmp_path, model_dir, steps=4), actors, reached, spec, reports=reports)
    assert sent.metrics["rewards/margins"] == by_file.metrics["rewards/margins"]
    assert sent.metrics["online/reward"] == by_file.metrics["online/reward"]
    assert max(gaps(reports)) < 1e-4
    assert wires.opened == (spec is OWN), "one group lasts"


def test_samplers_with_devices_of_their_own_are_ahead(tmp_path, model_dir, reached, wires):
    actors, kept = actors_of(OWN, model_dir, wires), KeptSamples()
    job = online_job(tmp_path, model_dir, steps=5)
    trained_on_devices(job, actors, reached, OWN, staleness=1, kept=kept)
    assert sorted(kept.steps) == list(range(5))
    behind = {s - sample.version for s, turns in kept.steps.items() for t in turns for sample in t.samples}
    assert behind <= {0, 1}
    assert 1 in behind


def test_iterations_begun_anew_get_their_iterate(tmp_path, model_dir, reached, wires):
    """Stopped after step 3, in an iteration of two: the samplers are sent version 2, which is the reference."""
    options = {"steps": 4, "refresh": RefreshSpec(every_steps=2)}
    whole = trained(online_job(tmp_path / "whole", model_dir, **options), sync_every=2)
    job, asked = online_job(tmp_path / "parts", model_dir, **options), iter([False] * 3 + [True])
    first = actors_of(OWN, model_dir, wires)
    assert trained_on_devices(job, first, reached, OWN, sync_every=2, stop=lambda: next(asked)).steps == 3
    again = actors_of(OWN, model_dir, wires)
    second = trained_on_devices(job, again, reached, OWN, sync_every=2)
    assert again[0].engine.log[:2] == ["start", "finish 2"]
    assert second.metrics["online/reward"] == whole.metrics["online/reward"]


def test_who_shares_a_device_takes_turns(tmp_path, model_dir, reached, wires):
    (actor,) = actors = actors_of(SHARED, model_dir, wires)
    asleep = []
    job = online_job(tmp_path, model_dir, steps=3)
    trained_on_devices(job, actors, reached, SHARED, seen=lambda _: asleep.append(set(actor.engine.asleep)))
    assert asleep == [BOTH] * 3, "the trainer trains while the sampler sleeps"
    first = ["start", "finish 0", "generate", "sleep"]
    turn = ["wake weights", "start", "finish {}", "wake kv_cache", "generate", "sleep"]
    assert actor.engine.log == first + [event.format(s) for s in (1, 2) for event in turn]


@pytest.mark.parametrize("spec", [OWN, OWN.model_copy(update={"samplers": 1}), SHARED], ids=["two", "one", "shared"])
def test_a_sampler_that_dies_between_transfers_answers_only_what_the_newest_policy_says(
    tmp_path, model_dir, reached, wires, spec
):
    """It is restarted with the base's weights. The only one there is: then the trainer, who waits for its pairs, is
    asked to send again."""
    actors, reports, kept = actors_of(spec, model_dir, wires), Reports(), KeptSamples()
    by_file = trained(online_job(tmp_path / "file", model_dir, steps=5))
    job = online_job(tmp_path, model_dir, steps=5)

    def seen(step):
        if step == 2:
            actors[0].dies_in = "sample"  # of step 3, whose weights it has been sent

    outcome = trained_on_devices(job, actors, reached, spec, seen=seen, reports=reports, kept=kept)
    assert actors[0].lives == 2
    assert max(gaps(reports)) < 1e-4
    versions = {s: {x.version for t in turns for x in t.samples} for s, turns in kept.steps.items()}
    assert versions == {s: {s} for s in range(5)}
    assert outcome.metrics["rewards/margins"] == by_file.metrics["rewards/margins"]
    assert actors[0].group_name != ""
    assert wires.opened == (0 if spec is SHARED else 2), "a group is made anew of those that are there"


def test_who_is_being_restarted_is_left_out_and_the_others_are_sent_to(tmp_path, model_dir, reached, wires):
    actors, kept = actors_of(OWN, model_dir, wires), KeptSamples()

    def seen(step):
        if step == 1:
            actors[0].may_return.clear()
            actors[0].kill()
        if step == 3:
            reached.loop.call_soon_threadsafe(actors[0].may_return.set)

    trained_on_devices(online_job(tmp_path, model_dir, steps=6), actors, reached, OWN, seen=seen, kept=kept)
    assert {s: {x.version for t in turns for x in t.samples} for s, turns in kept.steps.items()} == {
        s: {s} for s in range(6)
    }
    assert "finish 3" in actors[1].engine.log


@pytest.mark.parametrize("method", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_who_dies_within_a_transfer_breaks_it(tmp_path, model_dir, reached, wires, method):
    actors = actors_of(OWN, model_dir, wires)

    def seen(step):
        if step == 1:
            actors[1].dies_in = method

    with pytest.raises(TransferBroken, match="did not arrive: killed"):
        trained_on_devices(online_job(tmp_path, model_dir, steps=4), actors, reached, OWN, seen=seen)


def test_weights_that_an_engine_cannot_load_break_the_transfer(tmp_path, model_dir, reached, wires):
    actors = actors_of(OWN, model_dir, wires)
    actors[1].engine.fails = ValueError("no such layer")
    with pytest.raises(TransferBroken, match="no such layer"):
        trained_on_devices(online_job(tmp_path, model_dir, steps=2), actors, reached, OWN)
    assert actors[1].sampler._torn is not None


def test_samplers_of_another_model_end_the_run_before_anything_is_sent(tmp_path, model_dir, reached, wires):
    other = save_tiny_llama(tmp_path / "other")
    actors = [Actor(OWN, model_dir, wires), Actor(OWN, other, wires)]
    with pytest.raises(WeightsRefused, match="the trainer's weights are refused"):
        trained_on_devices(online_job(tmp_path, model_dir, steps=2), actors, reached, OWN)
    assert actors[0].engine.log == []


async def test_a_sampler_takes_nothing_else_for_the_weights_it_was_sent(model_dir, wires):
    from dpo_service.online.port import Weights

    actor = Actor(OWN, model_dir, wires)
    assert (await actor.sync(Weights(0, "device"))).version == 0
    with pytest.raises(SamplerLost, match="version 5 was sent while it was away"):
        await actor.sync(Weights(5, "device"))
    with pytest.raises(WeightsRefused, match="takes no full weights"):
        await actor.sync(Weights(5, "full", "/a/file"))
