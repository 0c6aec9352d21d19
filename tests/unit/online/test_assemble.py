"""Each source from its run's specification to trained steps: data, sampler (of transformers), judge, pairs, weights."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from dpo_service.checkpoint.format import digest_of
from dpo_service.errors import JudgeError
from dpo_service.online.judges.chat import ChatRequest, Said
from dpo_service.online.judges.port import Usage
from dpo_service.online.own_judge import ask_policy
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.judge import RulesJudgeSpec
from dpo_service.specs.method import RefreshSpec
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.run import OnlineSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec
from dpo_service.storage import paths
from tests.models import save_tiny_llama
from tests.unit.online.online_kit import RULES, Finishing, train_online
from tests.unit.train.training_kit import Recorder, make_job, random_rows

ROWS = 24
JUDGE = RulesJudgeSpec.model_validate(RULES)
ANY = PairingSpec(cut_off="any")
SOURCES = {
    "online": ({"sync": "step", "judge": JUDGE, "pairing": ANY, "staleness": 1}, "ipo"),
    "mixed": ({"sync": "step", "judge": JUDGE, "pairing": ANY, "mixed_pairs": 3}, "sigmoid"),
    "rso": ({"sync": "never", "judge": JUDGE, "accepted": 4, "rejection_beta": 0.5}, "hinge"),
    "sppo": ({"sync": "iteration", "iteration_steps": 2, "judge": JUDGE, "win_scale": 0.25}, "sppo"),
    "spin": ({"sync": "iteration", "iteration_steps": 2}, "sigmoid"),
}


def job_of(root, model_dir, source, *, steps=4):
    options, loss = SOURCES[source]
    columns = random_rows(ROWS)
    columns |= {"answer": columns["chosen"], "prompt_text": ['"a prompt"'] * ROWS}
    columns |= {"reference": [None] * ROWS, "row": ["{}"] * ROWS}
    every = options.get("iteration_steps")
    job = make_job(
        root,
        model_dir,
        loss=loss,
        reference="live",
        refresh=RefreshSpec(every_steps=every) if every else None,
        steps=steps,
        batch_size=4,
        validation=0,
        columns=columns,
    )
    sampling = SamplingSpec(n=1 if source == "spin" else 6, max_tokens=5)
    online = OnlineSpec(
        source="online" if source == "mixed" else source, sampling=sampling, samplers=SamplerSpec(), **options
    )
    job.run = job.run.model_copy(update={"online": online})
    if source == "mixed":
        job.dataset = job.dataset.model_copy(update={"mix": job.dataset.train})
    return job


def trained(job, recorder):
    digest = digest_of(job.model_dir)
    return train_online(job.run, job.dataset, job.model_dir, store=job.store, base_digest=digest, reports=recorder)


@pytest.mark.parametrize("source", list(SOURCES))
def test_a_source_trains(tmp_path, model_dir, source):
    job, recorder = job_of(tmp_path, model_dir, source), Recorder()
    outcome = trained(job, recorder)
    assert outcome.steps == 4
    told = [values for (split, _), values in recorder.values.items() if split == "train"]
    assert [values.get("online/valid_share", 1.0) > 0 for values in told] == [True] * 4
    assert all(values["online/logp_gap"] < 1e-4 for values in told[:1])
    versions = {"online": 0.5, "mixed": 0.0, "rso": 0.0, "sppo": 0.5, "spin": 0.5}
    staleness = sum(values["online/staleness"] for values in told) / 4
    assert staleness <= versions[source] + 0.5 if source == "online" else staleness == versions[source]
    assert told[0]["rewards/margins"] != told[-1]["rewards/margins"]
    kept = pq.read_table(job.store.path(paths.samples_dir("j")))
    assert set(kept["step"].to_pylist()) <= {1, 2, 3, 4}
    assert len(kept) == len(set(kept["position"].to_pylist()))
    assert kept["dropped"].null_count == sum(len(chosen) > 0 for chosen in kept["chosen"].to_pylist())


async def test_a_policy_that_judges_itself_is_asked_in_its_own_template(model_dir):
    sampler, tokenizer = Finishing(SamplerSpec(), model_dir, 0), Tokenizer.load(model_dir)
    ask = ask_policy(sampler, tokenizer, seed=1)
    question = ChatRequest((Said("user", "how good is it?"),), temperature=0.0, max_tokens=3)
    first, second = await ask(question), await ask(question)
    assert first.text == second.text, "at temperature 0"
    rendered = tokenizer.render([{"role": "user", "content": "how good is it?"}], add_generation_prompt=True)
    assert first.usage == Usage(1, len(tokenizer.encode(rendered, add_special_tokens=False)), 3)


async def test_what_the_policy_says_of_an_answer_depends_on_no_other_question(model_dir):
    """Asked in another order, as by a run that was resumed, it says the same; asked again, something else."""
    sampler, tokenizer = Finishing(SamplerSpec(), model_dir, 0), Tokenizer.load(model_dir)
    questions = [
        ChatRequest((Said("user", text),), temperature=1.0, max_tokens=8, sample=one)
        for text in ("how good is it?", "and this?")
        for one in range(2)
    ]
    unbroken = ask_policy(sampler, tokenizer, seed=1)
    said = [(await unbroken(question)).text for question in questions]
    resumed = ask_policy(sampler, tokenizer, seed=1)
    assert [(await resumed(question)).text for question in reversed(questions)] == said[::-1]
    assert len(set(said)) == len(questions)


async def test_a_model_without_a_template_cannot_judge_itself(tmp_path):
    model_dir = save_tiny_llama(tmp_path, chat_template=None)
    ask = ask_policy(Finishing(SamplerSpec(), model_dir, 0), Tokenizer.load(model_dir), seed=1)
    with pytest.raises(JudgeError, match="no chat template"):
        await ask(ChatRequest((Said("user", "how good is it?"),)))
