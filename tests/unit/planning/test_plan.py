"""Plans of whole jobs: what fits, what would make it fit, and that what is said to help does."""

from dataclasses import replace

import numpy as np
import pytest

from dpo_service.errors import InvalidSpec
from dpo_service.planning.choose import Question, choose, fixes
from dpo_service.planning.gpus import DEVICES
from dpo_service.planning.memory import Recipe
from dpo_service.planning.plan import _shards, device
from dpo_service.planning.workload import Lengths, load_of, workload
from dpo_service.specs.job import JobSpec
from tests.unit.planning.test_memory import LLAMA_8B

ROWS = Lengths.alike(2048, prompt=400, answer=300)


def question(**changes):
    asked = Question(
        shape=LLAMA_8B, recipe=Recipe(precision="bfloat16", workers=8), lengths=ROWS, batch_size=64, max_length=1024,
        device=DEVICES["H100-80"], rows=64, tokens=8192,
    )  # fmt: skip
    return replace(asked, **changes)


def test_a_model_that_is_copied_eight_times_does_not_fit_and_sharded_it_does():
    assert not choose(question()).fits(DEVICES["H100-80"])
    free = choose(question(strategies=("ddp", "fsdp"), checkpointing=(False, True), tokens=None))
    assert free.recipe.strategy == "fsdp"
    assert free.fits(DEVICES["H100-80"])


def test_every_fix_fits_when_it_is_made():
    found = fixes(question(checkpointing=(True,)))
    assert {"resources.strategy": "fsdp", "resources.workers": 8} in [fix.change for fix in found]
    assert {"lora": {"rank": 16}} in [fix.change for fix in found]
    for fix in found:
        assert fix.choice.memory.total <= DEVICES["B200"].usable
    one_by_one = fixes(question(recipe=Recipe(precision="bfloat16", workers=1, reference="live"), device=DEVICES["L4"]))
    assert all(fix.choice.memory.total <= DEVICES["B200"].usable for fix in one_by_one)


def test_where_nothing_helps_alone_changes_are_piled_up():
    tight = question(
        recipe=Recipe(precision="bfloat16", workers=1, reference="live"), device=DEVICES["A100-80"],
        lengths=Lengths.alike(64, prompt=6000, answer=2000), max_length=8192, batch_size=1, rows=1, tokens=32768,
    )  # fmt: skip
    only = replace(tight, lengths=Lengths.alike(1, prompt=6000, answer=2000))  # one row: it cannot be spread
    (pile,) = fixes(only)
    assert pile.choice.fits(DEVICES["A100-80"])
    assert {"activation_checkpointing", "reference", "lora"} <= pile.change.keys()


def test_a_base_of_four_bits_fits_on_a_small_device_and_is_not_sharded():
    small = question(recipe=Recipe(precision="bfloat16", workers=1, lora_rank=16), device=DEVICES["L4"], tokens=2048)
    found = {fix.text: fix for fix in fixes(replace(small, checkpointing=(True,)))}
    (four,) = [fix for fix in found.values() if fix.choice.recipe.four_bits]
    assert four.change == {"lora": {"rank": 16, "quantize": "nf4"}, "reference": "auto"}
    assert four.choice.memory.parts["weights"] < 0.4 * choose(small).memory.parts["weights"]
    sharded = replace(small, shards=False, strategies=("ddp", "fsdp"), recipe=replace(small.recipe, workers=4))
    assert choose(sharded).recipe.strategy == "ddp"


def test_a_mean_step_takes_as_long_on_twice_the_devices_with_twice_the_batch():
    small = choose(question(strategies=("fsdp",)))
    large = choose(question(strategies=("fsdp",), batch_size=128, recipe=Recipe(precision="bfloat16", workers=16)))
    assert large.speed.compute == pytest.approx(small.speed.compute, rel=0.01)
    assert large.speed.communication > small.speed.communication  # across nodes


def test_the_largest_micro_batch_keeps_to_the_budget_and_holds_the_longest_row():
    rng = np.random.default_rng(0)
    lengths = Lengths(*(rng.integers(5, 200, 300) for _ in range(3)))
    work = workload(lengths, 32, 2, 32, 2000)
    assert int(lengths.total.max()) <= work.largest.tokens <= 2000
    assert work.micro_batches >= 32 * lengths.total.mean() / 2 / 2000
    assert work.tokens == pytest.approx(32 * lengths.total.mean(), rel=0.07)


def test_a_padded_micro_batch_counts_its_padding():
    lengths = Lengths(np.array([10, 4]), np.array([5, 3]), np.array([2, 9]))
    assert load_of(lengths, [0, 1], packed=False).tokens == 4 * 15
    packed = load_of(lengths, [0, 1])
    assert (packed.tokens, packed.answers, packed.rejoined) == (33, 19, 25)
    seen_first = 15 * 16 // 2 + (12 * 13 - 10 * 11) // 2
    assert load_of(lengths, [0]).attended == seen_first


def test_shorter_rows_are_cut_as_the_data_stage_cuts_them():
    cut = Lengths(np.array([100]), np.array([50]), np.array([20])).within(80)
    assert (cut.prompt[0], cut.chosen[0], cut.rejected[0]) == (30, 50, 20)


def test_mismatched_answers_are_computed_forward_and_not_more():
    """KTO: a pass forward beside the three of training, over the row's prompt with another row's answer."""
    prompts, answers, nothing = np.full(2048, 400), np.full(2048, 300), np.zeros(2048, int)
    plain, kto = Lengths(prompts, answers, nothing), Lengths(prompts, answers, nothing, answers)
    sharded, rate = question(strategies=("fsdp",)), DEVICES["H100-80"].rate("bfloat16")
    supervised = choose(replace(sharded, lengths=plain, tokens=7_000))
    cached = choose(replace(sharded, lengths=kto, tokens=10_000))  # as many rows, of 400 + 300 + 300
    live = choose(replace(sharded, lengths=kto, tokens=10_000, recipe=replace(sharded.recipe, reference="live")))
    assert cached.work.largest == supervised.work.largest
    forward = supervised.speed.useful / 3
    assert cached.speed.useful == live.speed.useful == pytest.approx(4 * forward, rel=0.001)
    assert cached.speed.compute - supervised.speed.compute == pytest.approx(forward / rate, rel=0.001)
    assert live.speed.compute - cached.speed.compute == pytest.approx(2 * forward / rate, rel=0.001)
    # Weights are gathered twice, and once more for each pass without a gradient: 2 bytes, gradients 4.
    for choice, gathers in ((cached, 3), (live, 5)):
        assert choice.speed.communication / supervised.speed.communication == pytest.approx((gathers * 2 + 4) / 8)
        assert choice.speed.memory > supervised.speed.memory
    assert load_of(kto.scored, [0]).tokens == 1000


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"precision": "pure_bfloat16"},
        {"lora": {"rank": 8}},
        {"optimizer": "adamw_8bit"},
        {"optimizer": "adamw_offload"},
        {"lora": {"dora": True}},
        {"lora": {"quantize": "nf4"}},
        {"reference_refresh": {"every_steps": 5}},
    ],
)
def test_sharding_is_proposed_where_a_job_may_ask_for_it(fields):
    job = {"model": "m", "training_file": "f", "method": {"type": "dpo"}, **fields}
    gpus = {"workers": 2, "gpus_per_worker": 1}
    wanted = JobSpec.model_validate(job | {"resources": gpus})
    if _shards(wanted):
        JobSpec.model_validate(job | {"resources": gpus | {"strategy": "fsdp"}})
    else:
        with pytest.raises(ValueError, match="or use 'ddp'"):
            JobSpec.model_validate(job | {"resources": gpus | {"strategy": "fsdp"}})


def test_an_unknown_device_is_refused_with_those_there_are():
    assert device("h100-80") is DEVICES["H100-80"]
    assert device("RTX 4090") is DEVICES["RTX-4090"]
    with pytest.raises(InvalidSpec, match="A100-40"):
        device("V100")
