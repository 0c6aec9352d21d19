"""Every job file in configs/ from submission to a checkpoint: admitted, prepared, trained; the model and rows tiny."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from dpo_service import runner
from dpo_service.checkpoint.format import digest_of
from dpo_service.cli.jobfile import load
from dpo_service.jobs.admit import admit
from dpo_service.reports import Reporter
from dpo_service.specs.job import JobSpec
from dpo_service.specs.run import AttemptSpec, RunSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store
from dpo_service.train.loop import TrainOutcome, train
from tests.models import save_tiny_llama
from tests.unit.jobs.admission import upload
from tests.unit.jobs.world import open_world
from tests.unit.online.online_kit import RULES, train_online

pytestmark = pytest.mark.ray
JOBS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
ROWS = 40
SAMPLED = ("online", "rso", "sppo", "spin", "self_rewarding")


def row(kind: str, number: int) -> dict[str, Any]:
    question, good, bad = f"Which colour is {number}?", f"{number} is green.", "It may be so or so."
    if kind == "supervised":
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": good}]}
    if kind == "kto":
        return {"prompt": question, "completion": good if number % 2 else bad, "label": bool(number % 2)}
    if kind == "dpo-sharegpt":
        answers = {"chosen": {"from": "gpt", "value": good}, "rejected": {"from": "gpt", "value": bad}}
        return {"conversations": [{"from": "human", "value": question}], **answers}
    judged = {"chosen_probability": 0.5 + number / 100} if kind == "dpo-sppo" else {}
    return {"prompt": question, "chosen": good, "rejected": bad, **judged}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all, so that a reference's log-probabilities are computed once for all jobs on the same rows."""
    root = tmp_path_factory.mktemp("examples")
    save_tiny_llama(Store(root).path(paths.user_model("tiny")))
    return root


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
async def test_every_example_trains(root: Path, tmp_path: Path, ray_connected: None, path: Path) -> None:
    kind = next((name for name in ("supervised", "kto", "dpo-sharegpt", "dpo-sppo") if name in path.stem), "pairs")
    document = load(path) | {"model": "tiny", "seed": 0, "max_steps": 2, "resources": {"workers": 1}}
    if document.get("lora", {}).get("quantize"):
        pytest.skip("a base of 4 bits needs a GPU and bitsandbytes")
    _answered_here(document)
    async with open_world(root) as world:
        document["training_file"] = await upload(world, [row(kind, number) for number in range(ROWS)])
        if "mix" in document:
            document["mix"]["file"] = await upload(world, [row("pairs", number) for number in range(ROWS)])
        if "validation_file" in document:
            document["validation_file"] = await upload(world, [row(kind, number) for number in range(ROWS, ROWS + 4)])
        spec = JobSpec.model_validate(document | ({"max_length": 256} if "max_length" in document else {}))
        assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec, "as the database gives it back"
        run, report = await admit(
            spec, database=world.database, store=world.store, cluster=world.cluster, settings=world.settings
        )
        assert report.kept == ROWS
        outcome, values = await asyncio.to_thread(_run, run, world.store, tmp_path)
    assert outcome.steps == 2
    assert outcome.checkpoint is not None
    assert all(math.isfinite(value) for value in values.values())
    assert values["learning_rate"] > 0


def _answered_here(document: dict[str, Any]) -> None:
    """Sample few and short answers, and ask no judge that is elsewhere."""
    if document["method"]["type"] not in SAMPLED:
        return
    document["sampling"] = document["sampling"] | {"max_tokens": 8}
    document["sampling"].update({"n": 8} if "n" in document["sampling"] else {})
    if document.get("judge", {}).get("kind") not in (None, "self_rewarding"):
        document["judge"] = RULES
        document.pop("pairing", None)


def _run(run: RunSpec, store: Store, spool: Path) -> tuple[TrainOutcome, dict[str, float]]:
    """What the runner does, on this process as the only worker."""
    written = AttemptSpec(run=run, attempt=1, report_url=None, report_token="").model_dump_json()
    attempt = AttemptSpec.model_validate_json(written)
    assert attempt.run == run
    model_dir = runner.locate_model(store, run.model)
    digest = digest_of(model_dir)
    with Reporter(spool, "driver", url=None, token="") as reporter:
        dataset = runner._prepare(store, attempt, model_dir, digest, reporter)
        trains = train_online if run.online else train
        outcome = trains(run, dataset, model_dir, store=store, base_digest=digest, reports=reporter)
    return outcome, outcome.metrics
