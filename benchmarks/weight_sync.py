"""New weights into a sampler, and sampling in the loop against bare vLLM, in one process on the CPU.

    python -m benchmarks.weight_sync [--output FILE] [--skip-large]

`weight_sync/MODEL`: seconds from the trainer's tensors to a sampler that has them: publishing (write, digest),
checking, loading. Models: the demo's, and one of 40 million parameters. `sampling`: our sampler against vLLM's
`LLM.generate` with the same prompts, options and seeds, by turns; `of_plain` is the share of what vLLM does without
what online training needs, seeds and log-probabilities.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
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
from dpo_service.online.engine import engine_options
from dpo_service.online.port import SamplePrompt, seed_of
from dpo_service.online.vllm_sampler import VllmSampler, sampling_parameters
from dpo_service.online.weights import WeightsFolder
from dpo_service.specs.sampling import SamplerSpec, SamplingSpec

SPEC = SamplerSpec(max_num_seqs=32, kv_cache_bytes=256 << 20)
OPTIONS = SamplingSpec(n=4, max_tokens=32)
PROMPTS, LENGTH = 64, 40
ROUNDS = 5


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


def some_prompts(step: int) -> list[SamplePrompt]:
    return [
        SamplePrompt(tuple(10 + (7 * index + place) % 200 for place in range(LENGTH)), seed_of(0, step, index))
        for index in range(PROMPTS)
    ]


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
    rates: dict[str, list[float]] = {"ours": [], "bare": [], "bare_plain": []}
    for step in range(ROUNDS + 1):  # the first one warms up
        prompts = some_prompts(step)
        started = time.perf_counter()
        answers = await sampler.sample(prompts, OPTIONS)
        tokens = sum(len(sample.token_ids) for some in answers for sample in some)
        turn = {"ours": tokens / (time.perf_counter() - started)}
        turn |= {"bare": theirs(prompts, True), "bare_plain": theirs(prompts, False)}
        for name, rate in turn.items():
            rates[name] += [rate] if step else []
    await sampler.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    shares = [one / other for one, other in zip(rates["ours"], rates["bare"], strict=True)]
    return {
        "ours": medians["ours"],
        "peer": medians["bare"],
        "ratio": statistics.median(shares),
        "of_plain": medians["ours"] / medians["bare_plain"],
        "unit": "answer tokens a second, the peer is vLLM's LLM.generate",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=results.DEFAULT)
    parser.add_argument("--skip-large", action="store_true", help="only the demo's model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        models = make_models(Path(directory))
        for name, model_dir in models.items():
            if name == "demo" or not arguments.skip_large:
                entry = asyncio.run(sync_seconds(model_dir))
                results.record(arguments.output, f"weight_sync/{name}", entry)
                print(f"{name}: {entry['parameters'] / 1e6:.1f}M parameters, {entry['ours']:.3f} s to new weights")
        entry = asyncio.run(throughput(models["demo"]))
    results.record(arguments.output, "sampling", entry)
    print(f"sampling: {entry['ratio']:.0%} of bare vLLM, {entry['of_plain']:.0%} without seeds and log-probabilities")


if __name__ == "__main__":
    main()
