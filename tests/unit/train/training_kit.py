"""A tiny model, its tokenizer, and datasets of random rows: everything a run needs, made in a second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from dpo_service.checkpoint.format import digest_of
from dpo_service.checkpoint.load import newest_valid, opened
from dpo_service.manifests.dataset import ANSWERS, DatasetManifest, DatasetReport, SplitManifest
from dpo_service.specs.data import DataSpec
from dpo_service.specs.loss import LOSS_TABLE, LossSpec
from dpo_service.specs.method import ReferenceSpec, RefreshSpec
from dpo_service.specs.optim import OptimSpec
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.run import BatchSpec, ModelSource, RunSpec
from dpo_service.storage.store import Store
from dpo_service.train.loop import train
from dpo_service.train.reference import ReferenceScorer

VOCAB = 300
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_model(directory: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    """A random two-layer Llama with a BPE tokenizer and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(["abc"], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    return directory


def random_rows(count: int, *, rows: str = "pairs", seed: int = 0) -> dict[str, list]:
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return [rng.integers(4, VOCAB, rng.integers(low, high)).tolist() for _ in range(count)]

    columns = {"index": list(range(count)), "prompt": ids(3, 12), "truncated": [row % 4 == 0 for row in range(count)]}
    columns |= {name: ids(2, 14) for name in ANSWERS[rows]}
    return columns | ({"label": [float(row % 3 > 0) for row in range(count)]} if rows == "unpaired" else {})


def as_table(columns: dict[str, list]) -> pa.Table:
    lists = pa.list_(pa.int32())
    types = {"index": pa.int64(), "truncated": pa.bool_(), "label": pa.float32()}
    types |= dict.fromkeys(("prompt_text", "reference", "row"), pa.string())
    return pa.table({name: pa.array(values, types.get(name, lists)) for name, values in columns.items()})


@dataclass
class Job:
    """A run, its data and its store."""

    run: RunSpec
    dataset: DatasetManifest
    store: Store
    model_dir: Path

    def train(self, **options):
        return train(
            self.run, self.dataset, self.model_dir, store=self.store, base_digest=digest_of(self.model_dir), **options
        )


def _split(store: Store, name: str, table: pa.Table) -> SplitManifest:
    key = f"jobs/j/dataset/{name}.parquet"
    store.path(key).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, store.path(key))
    return SplitManifest(name=name, files=(key,), rows=table.num_rows, tokens=0, digest=f"digest-{name}")


def make_job(
    root: Path,
    model_dir: Path,
    *,
    loss: str = "sigmoid",
    reference: str = "cached",
    refresh: RefreshSpec | None = None,
    rows: int = 48,
    validation: int = 8,
    steps: int = 6,
    batch_size: int = 8,
    micro_batch_size: int = 4,
    micro_batch_tokens: int = 8192,
    learning_rate: float = 3e-3,
    columns: dict[str, list] | None = None,
    label_smoothing: float | None = None,
    loss_options: dict[str, float] | None = None,
    shuffle: bool = True,
    weight_decay: float = 0.0,
    optimizer: str = "adamw",
    **run_options,
) -> Job:
    store = Store(root)
    kind, referenced = {"sft": "answers", "kto": "unpaired"}.get(loss, "pairs"), LOSS_TABLE[loss].reference
    options = dict(loss_options or {}) | ({} if label_smoothing is None else {"label_smoothing": label_smoothing})
    tables = {"train": as_table(columns or random_rows(rows, rows=kind))}
    if validation:
        tables["validation"] = as_table(random_rows(validation, rows=kind, seed=1))
    base = digest_of(model_dir)
    if referenced and reference == "cached":
        scorer = ReferenceScorer(
            str(model_dir),
            "float32",
            BatchSpec(batch_size=8, micro_batch_size=8, n_epochs=1),
            options.get("ld_alpha", 1.0),
        )
        tables = {name: scorer(table) for name, table in tables.items()}
    splits = {name: _split(store, name, table) for name, table in tables.items()}
    dataset = DatasetManifest(
        rows=kind,
        train=splits["train"],
        validation=splits.get("validation"),
        report=DatasetReport(format="test", rows=rows, kept=rows),
        plan="jobs/j/dataset/plan",
        steps_per_epoch=tables["train"].num_rows // batch_size,
        total_steps=steps,
        tokenizer_digest="t",
        reference_digest=base if referenced else None,
    )
    run = RunSpec(
        job_id="j",
        method={"answers": "supervised", "unpaired": "kto"}.get(kind, "dpo"),
        model=ModelSource(name="tiny", path=str(model_dir)),
        data=DataSpec(
            rows=dataset.rows,
            training_file="files/f",
            training_name="f.jsonl",
            max_length=64,
            shuffle=shuffle,
        ),
        loss=LossSpec(name=loss, **options),
        reference=ReferenceSpec(mode=reference if referenced else "none", refresh=refresh),
        optim=OptimSpec(learning_rate=learning_rate, weight_decay=weight_decay, optimizer=optimizer),
        batch=BatchSpec(
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            n_epochs=50,
            max_steps=steps,
        ),
        precision=run_options.pop("precision", "float32"),
        resources=run_options.pop("resources", ResourceSpec()),
        seed=0,
        output_model="ft:tiny::j",
        **run_options,
    )
    return Job(run, dataset, store, model_dir)


class Recorder:
    """Keeps what a run reports."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, int], dict[str, float]] = {}
        self.checkpoints: list[int] = []
        self.messages: list[str] = []
        self.references: dict[int, str] = {}
        self.warnings: dict[str, str] = {}

    def message(self, text, *, level="info", key=None, **data):
        if level == "warn":
            assert key not in self.warnings or self.warnings[key] == text
            self.warnings[key] = text
        else:
            self.messages.append(text)

    def metrics(self, split, step, values, text):
        self.values[split, step] = dict(values)

    def checkpoint(self, step, storage_key, digest, metrics, pruned):
        self.checkpoints.append(step)

    def reference(self, step, digest):
        self.references[step] = digest

    def progress(self, stage, done, total, text):
        pass

    def losses(self, split="train"):
        return [values["loss"] for (kind, _), values in sorted(self.values.items()) if kind == split]


def weights(job: Job, step: int | None = None) -> list[dict[str, torch.Tensor]]:
    """Model and optimizer of the checkpoint of `step`, or of the newest."""
    checkpoint = newest_valid(job.store, "j") if step is None else opened(job.store, "j", step)
    files = (checkpoint.model / "model.safetensors", checkpoint.state / "optimizer.safetensors")
    return [{name: tensor.clone() for name, tensor in load_file(path).items()} for path in files]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
