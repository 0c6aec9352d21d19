"""New weights into a sampler, and sampling in the loop against bare vLLM, in one process on the CPU.

    python -m benchmarks.weight_sync [--json FILE] [--skip-large]

`weight_sync/MODEL`: seconds from the trainer's tensors to a sampler that has them: publishing (write, digest),
checking, loading. Models: the demo's, and one of 40 million parameters.

`sampling`: answer tokens a second of the demo's model, by turns with the same prompts, options and seeds. Ours is the
curator's, from asking for a step's pairs to having them: prompts, vLLM, texts, verdicts of a judge of rules, pairs; no
trainer takes its core (for that see `overlap`). The peer is one call of vLLM's `LLM.generate`. `of_plain` is our share
of what that does without what online training needs, seeds and log-probabilities; `sampler` is the share of the peer
that our sampler reaches alone, without a curator.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    TORCHDYNAMO_DISABLE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
)

from benchmarks import results
from dpo_service.demo import model as demo
from dpo_service.online.curator import Curator, CuratorPlan
from dpo_service.online.engine import engine_options
from dpo_service.online.judges.metrics import Counted
from dpo_service.online.judges.rules import RulesJudge
from dpo_service.online.port import SamplePrompt, Sampler, seed_of
from dpo_service.online.prompts import PromptRow
from dpo_service.online.sources import Judged
from dpo_service.online.vllm_sampler import VllmSampler, sampling_parameters
from dpo_service.online.weights import WeightsFolder
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.judge import RulesJudgeSpec
from dpo_service.specs.pairing import PairingSpec
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec

SPEC = SamplerSpec(max_num_seqs=32, kv_cache_bytes=256 << 20)
OPTIONS = SamplingSpec(n=4, max_tokens=32)
PROMPTS, LENGTH = 64, 40
ROUNDS = 5
LETTERS = "abcdefghijkl"
RULES = [{"rule": "pattern", "pattern": letter, "weight": 2.0**place} for place, letter in enumerate(LETTERS)]
"""Two random answers are seldom worth the same, so nearly each prompt gives a pair."""


def make_models(directory: Path) -> dict[str, Path]:
    """The demo's model, and one twenty times its size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small, large = directory / "demo", directory / "large"
    demo.make_base_model(small, ["some text to make a tokenizer of, with 0123456789"])
    config = AutoConfig.from_pretrained(small)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1408, 12
    config.num_attention_heads = config.num_key_value_heads = 16
    AutoModelForCausalLM.from_config(config).save_pretrained(large)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (large / name).write_bytes((small / name).read_bytes())
    return {"demo": small, "large": large}


class SomePrompts:
    """A `steps.Prompts`."""

    def at(self, position: int) -> PromptRow:
        ids = tuple(10 + (7 * position + place) % 200 for place in range(LENGTH))
        return PromptRow(position, ids, "a prompt", None, {})

    def of_step(self, step: int) -> list[SamplePrompt]:
        """As the curator asks them, where each gives a pair."""
        return [
            SamplePrompt(self.at(position).token_ids, seed_of(0, position, 0))
            for position in range(step * PROMPTS, (step + 1) * PROMPTS)
        ]


def make_curator(model_dir: Path, sampler: Sampler) -> Curator:
    """It makes a step's pairs when they are asked for, and keeps the sampler's weights."""
    return Curator(
        CuratorPlan(ROUNDS + 1, PROMPTS, 0, staleness=0, sync_every=None, chunk=SPEC.max_num_seqs // OPTIONS.n),
        SomePrompts(),
        sampler,
        Judged(Counted(RulesJudge(RulesJudgeSpec.model_validate({"rules": RULES}))), PairingSpec(cut_off="any")),
        OPTIONS,
        partial(Tokenizer.load(model_dir).decode, special_tokens=False),
    )


async def sync_seconds(model_dir: Path) -> dict[str, Any]:
    """Medians over `ROUNDS` versions."""
    from dpo_service.train.policy import load_model, merged_state

    policy, sampler = load_model(model_dir), await VllmSampler.start(SPEC, model_dir, 0)
    folder = WeightsFolder(sum(p.numel() * p.element_size() for p in policy.parameters()))
    published, synced = [], []
    try:
        for version in range(1, ROUNDS + 1):
            started = time.perf_counter()
            weights = folder.publish(policy, merged_state(policy), version, SPEC.dtype)
            published.append(time.perf_counter() - started)
            synced.append((await sampler.sync(weights)).seconds)
            folder.drop_before(version)
    finally:
        folder.remove()
        await sampler.close()
    whole = [one + other for one, other in zip(published, synced, strict=True)]
    return {
        "ours": statistics.median(whole),
        "unit": "seconds from the trainer's tensors to a sampler that has them",
        "parameters": sum(p.numel() for p in policy.parameters()),
        "publish_s": statistics.median(published),
        "load_s": statistics.median(synced),
    }


def bare(model_dir: Path) -> Callable[[list[SamplePrompt], bool], float]:
    """Answer tokens a second of vLLM's `LLM.generate`; `same` = with our seeds and log-probabilities."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    options = engine_options(SPEC, model_dir)
    engine = LLM(**options)

    def generate(prompts: list[SamplePrompt], same: bool) -> float:
        tokens = [TokensPrompt(prompt_token_ids=list(prompt.token_ids)) for prompt in prompts]
        plain = SamplingParams(
            n=OPTIONS.n, temperature=OPTIONS.temperature, max_tokens=OPTIONS.max_tokens, detokenize=False
        )
        parameters = [sampling_parameters(prompt, OPTIONS) if same else plain for prompt in prompts]
        started = time.perf_counter()
        made = engine.generate(tokens, parameters, use_tqdm=False)
        seconds = time.perf_counter() - started
        return sum(len(answer.token_ids) for one in made for answer in one.outputs) / seconds

    return generate


async def throughput(model_dir: Path) -> dict[str, Any]:
    """Answer tokens a second, medians over rounds taken by turns."""
    theirs, sampler = bare(model_dir), await VllmSampler.start(SPEC, model_dir, 0)
    curator, asked = make_curator(model_dir, sampler), SomePrompts()
    await curator.start(0, None, {})
    rates: dict[str, list[float]] = {"loop": [], "sampler": [], "bare": [], "plain": []}
    for step in range(ROUNDS + 1):  # the first one warms up
        prompts, started = asked.of_step(step), time.perf_counter()
        made = await curator.pairs(step)
        looped = time.perf_counter()
        answers = await sampler.sample(prompts, OPTIONS)
        tokens = sum(len(sample.token_ids) for some in answers for sample in some)
        turn = {
            "loop": made.stats.tokens / (looped - started),
            "sampler": tokens / (time.perf_counter() - looped),
            "bare": theirs(prompts, True),
            "plain": theirs(prompts, False),
        }
        for name, rate in turn.items():
            rates[name] += [rate] if step else []
    await curator.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}

    def share(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))

    return {
        "ours": medians["loop"],
        "peer": medians["bare"],
        "ratio": share("loop", "bare"),
        "of_plain": share("loop", "plain"),
        "sampler": share("sampler", "bare"),
        "unit": "answer tokens a second, the peer is vLLM's LLM.generate",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=results.DEFAULT)
    parser.add_argument("--skip-large", action="store_true", help="only the demo's model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        models = make_models(Path(directory))
        for name, model_dir in models.items():
            if name == "large" and options.skip_large:
                continue
            entry = asyncio.run(sync_seconds(model_dir))
            results.record(options.json, f"weight_sync/{name}", entry)
            print(f"{name}: {entry['parameters'] / 1e6:.1f}M parameters, {entry['ours']:.3f} s to new weights")
        entry = asyncio.run(throughput(models["demo"]))
    results.record(options.json, "sampling", entry)
    print(f"sampling: {entry['ratio']:.0%} of bare vLLM, the sampler alone {entry['sampler']:.0%}; "
          f"{entry['of_plain']:.0%} without seeds and log-probabilities")  # fmt: skip


if __name__ == "__main__":
    main()
