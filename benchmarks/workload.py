"""What the step's benchmarks train on: a 40M-parameter Llama, and preference rows of log-normal lengths."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results

LENGTHS: dict[str, tuple[tuple[int, int], tuple[int, int], int | None]] = {
    "short": ((120, 800), (40, 550), None),
    "long": ((400, 3500), (300, 900), 1024),
}
"""(mean, largest) of prompts and of answers, and the length that prompt and answer are cut to, in tokens."""
SPREAD = 0.9
"""Standard deviation of a length's logarithm."""
RATE = 5e-5
Columns = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Setting:
    rows: str
    """A name in `LENGTHS`, or a preference file of pairs."""
    steps: int
    batch: int
    precision: str
    reference: str
    threads: int
    vocabulary: int
    folder: Path

    @property
    def model_dir(self) -> Path:
        return self.folder / "model"


def options_of(doc: str) -> argparse.ArgumentParser:
    """The options of a benchmark whose variants take turns in one process, in float32, the reference known."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rows", choices=LENGTHS, default="short")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--json", type=Path, default=results.DEFAULT)
    return parser


def setting_of(options: argparse.Namespace, steps: int, folder: Path) -> Setting:
    """What `options_of` was told; torch is to be imported after it."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    return Setting(
        rows=options.rows,
        steps=steps,
        batch=options.batch,
        precision="float32",
        reference="cached",
        threads=options.threads,
        vocabulary=options.vocabulary,
        folder=folder,
    )


def make_rows(setting: Setting) -> Columns:
    """Token ids of `steps * batch` pairs: prompt, chosen, rejected. A prompt too long for its answers loses its start.

    Of a file only the lengths are taken, in bytes divided by four, as the model here knows no words.
    """
    rng = np.random.default_rng(0)
    count = setting.steps * setting.batch
    if setting.rows in LENGTHS:
        lengths, limit = _drawn(rng, setting.rows, count), LENGTHS[setting.rows][2]
    else:
        lengths, limit = _of_file(Path(setting.rows), count), 1024
    columns: Columns = {"prompt": [], "chosen": [], "rejected": []}
    for row in lengths:
        prompt, chosen, rejected = (rng.integers(4, setting.vocabulary, max(2, length)).tolist() for length in row)
        if limit:
            chosen, rejected = chosen[: limit - 1], rejected[: limit - 1]
        room = limit - max(len(chosen), len(rejected)) if limit else len(prompt)
        for name, value in (("prompt", prompt[-room:]), ("chosen", chosen), ("rejected", rejected)):
            columns[name].append(value)
    return columns


def _drawn(rng: np.random.Generator, kind: str, count: int) -> list[tuple[int, int, int]]:
    prompts, answers, _ = LENGTHS[kind]

    def length(mean: int, largest: int) -> int:
        drawn = rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD)
        return int(np.clip(drawn, 2, largest))

    return [(length(*prompts), length(*answers), length(*answers)) for _ in range(count)]


def _of_file(path: Path, count: int) -> list[tuple[int, int, int]]:
    from dpo_service.rows.formats import normalise, recognise
    from dpo_service.rows.sources import parse_row, raw_rows

    found, lengths = None, []
    for line, text in raw_rows(path, path.name):
        value = parse_row(text, line)
        found = found or recognise(value, line)
        row = normalise(value, line, found)
        parts = (row.prompt, *row.answers)
        if len(parts) != 3:
            raise SystemExit(f"{path}, line {line}: the benchmark needs pairs, and this is a row of {found.name!r}")
        lengths.append(tuple(_bytes_of_text(part) // 4 for part in parts))
    if not lengths:
        raise SystemExit(f"{path} holds no rows")
    return [lengths[number % len(lengths)] for number in range(count)]


def _bytes_of_text(part: Any) -> int:
    if isinstance(part, str):
        return len(part.encode())
    return sum(len(str(message.get("content") or "").encode()) for message in part)


def make_model(directory: Path, vocabulary: int, *, layers: int = 8, hidden: int = 512) -> int:
    """Write a random model and a tokenizer of the words w2, w3, ...; returns the model's number of parameters."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, vocabulary)}
    core = Tokenizer(WordLevel(words, unk_token="<eos>"))
    core.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return int(model.num_parameters())


def run_spec(setting: Setting) -> Any:
    """The job that our side of a benchmark runs."""
    from dpo_service.jobs.choices import CPU_MICRO_BATCH_TOKENS
    from dpo_service.specs.data import DataSpec
    from dpo_service.specs.loss import LossSpec
    from dpo_service.specs.method import ReferenceSpec
    from dpo_service.specs.optim import OptimSpec
    from dpo_service.specs.resources import ResourceSpec
    from dpo_service.specs.run import BatchSpec, ModelSource, RunSpec

    return RunSpec(
        job_id="bench",
        method="dpo",
        model=ModelSource(name="bench", path=str(setting.model_dir)),
        data=DataSpec(rows="pairs", training_file="files/f", training_name="f.jsonl", max_length=8192),
        loss=LossSpec(name="sigmoid", beta=0.1),
        reference=ReferenceSpec(mode=setting.reference),
        optim=OptimSpec(learning_rate=RATE, lr_schedule="constant", warmup_ratio=0.0, weight_decay=0.0),
        batch=BatchSpec(
            batch_size=setting.batch,
            micro_batch_size=setting.batch,
            micro_batch_tokens=CPU_MICRO_BATCH_TOKENS,
            n_epochs=1,
            max_steps=setting.steps,
        ),
        precision=setting.precision,
        resources=ResourceSpec(),
        seed=0,
        output_model="ft:bench::bench",
    )
