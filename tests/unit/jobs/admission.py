"""Jobs for admission to look at: rows as files, a model that has no weights to look into, and one way to ask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_service import ids
from dpo_service.jobs.admit import admit
from dpo_service.manifests.dataset import DatasetReport
from dpo_service.registry import files
from dpo_service.registry.tables import File
from dpo_service.specs.run import RunSpec
from dpo_service.storage import paths
from tests.models import CHAT_TEMPLATE, save_no_weights, save_tokenizer
from tests.unit.jobs.world import World, job_spec

PAIRS = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"Not {n}."} for n in range(12)]
ANSWERS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(12)]
UNPAIRED = [row | {"label": number > 8} for number, row in enumerate(ANSWERS)]
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"What is {n}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {n}."}],
        "rejected": [{"role": "assistant", "content": f"Not {n}."}],
    }
    for n in range(12)
]


def save_model(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A directory that looks like a model with a context of 256 tokens; the weights are not looked into."""
    save_tokenizer(directory, chat_template=chat_template)
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 256, "vocab_size": 400}
    (directory / "config.json").write_text(json.dumps(config))
    save_no_weights(directory)


async def upload(world: World, rows: Sequence[dict], *, purpose: str = "fine-tune", kind: str | None = None) -> str:
    file_id = ids.new_file_id()
    key = paths.file_key(file_id, "rows.jsonl")
    world.store.write(key, "".join(json.dumps(row) + "\n" for row in rows).encode())
    row = File(
        id=file_id, name="rows.jsonl", bytes=1, purpose=purpose, created_at=world.clock.now(), status="processed",
        key=key, sha256="0" * 64, rows=kind,
    )  # fmt: skip
    async with world.database.begin() as session:
        await files.create(session, row)
    return file_id


async def ask(world: World, rows: Sequence[dict] = PAIRS, **fields: Any) -> tuple[RunSpec, DatasetReport]:
    fields = {"training_file": await upload(world, rows), **fields}
    return await admit(
        job_spec(**fields),
        database=world.database,
        store=world.store,
        cluster=world.cluster,
        settings=world.settings,
        clock=world.clock,
    )


def dpo(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
