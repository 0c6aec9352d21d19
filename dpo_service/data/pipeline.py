"""The data stage: a preference file becomes token ids, reference log-probabilities, a batch plan and a report.

    validation file ─┐
    training file ───┴─> encode_file ─> decide ─> hold_out ─> write_split ─> reference_logps ─> plan ─> dataset.json
                         (Ray Data)     repeats,   split       Parquet       (Ray Data,         Parquet
                                        leakage                              cached)

All of it is written beside the dataset's directory and appears there at once, or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dpo_service.data.encoding import EncodedFile, Progress, encode_file
from dpo_service.data.reference import ScorerFactory, add_columns, cache_key, reference_logps
from dpo_service.data.splits import split_digest, with_mismatched, write_split
from dpo_service.errors import InvalidData, InvalidSpec, StopAsked
from dpo_service.manifests.dataset import ANSWERS, DatasetManifest, DatasetReport, SplitManifest
from dpo_service.reports import Reporter
from dpo_service.rows.check import MIN_ROWS, require_rows
from dpo_service.rows.facts import Facts, decide, report
from dpo_service.rows.holdout import Mask, hold_out
from dpo_service.rows.plan import BatchPlan, PromptOrder
from dpo_service.rows.summary import summary
from dpo_service.rows.template import Tokenizer
from dpo_service.specs.data import DataSpec
from dpo_service.specs.method import PROMPT_KINDS, RowKind
from dpo_service.specs.resources import ResourceSpec
from dpo_service.specs.run import BatchSpec
from dpo_service.storage import paths
from dpo_service.storage.store import Store

MANIFEST = "dataset.json"
PLAN = "plan.parquet"


def never() -> bool:
    return False


def prepare(
    store: Store,
    spec: DataSpec,
    batch: BatchSpec,
    *,
    job_id: str,
    model_dir: Path,
    reporter: Reporter,
    scorer: ScorerFactory | None,
    reference_digest: str | None,
    scored_as: Mapping[str, Any] | None = None,
    resources: ResourceSpec | None = None,
    stop: Callable[[], bool] = never,
) -> DatasetManifest:
    """Prepare a job's dataset, or find it where an earlier attempt left it. Ray must be initialised.

    Args:
        scorer: builds, in an actor, what computes reference log-probabilities; None = the loss needs none.
        reference_digest: identifies the reference model's weights.
        scored_as: what else `scorer` depends on (precision, ld_alpha); None = its log-probabilities are not cached
            between jobs.
        stop: asked between shards and between batches of the reference, whether to leave.

    Raises:
        InvalidData: a row, or what is left of the file, cannot be trained on; `param` names the file's field.
        InvalidSpec: the batch size is larger than the training split.
        StopAsked: `stop` said so. What was made is gone; the next attempt makes it again.
    """
    key = paths.dataset_dir(job_id)
    manifest = _existing(store, key)
    if manifest is None:
        with store.publishing(key) as directory:
            stage = _Stage(store, spec, batch, model_dir, reporter, directory, key, stop)
            manifest = stage.run(scorer, reference_digest, scored_as, resources or ResourceSpec())
            shutil.rmtree(stage.scratch)
            (directory / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    reporter.dataset(manifest.model_dump(mode="json"), summary(manifest.report, manifest))
    return manifest


def _existing(store: Store, key: str) -> DatasetManifest | None:
    """The dataset of an earlier attempt, if it is whole."""
    if not store.exists(f"{key}/{MANIFEST}"):
        return None
    try:
        manifest = store.read_model(f"{key}/{MANIFEST}", DatasetManifest)
        splits = [split for split in (manifest.train, manifest.validation) if split is not None]
        whole = all(_verifies(store, manifest.rows, split) for split in splits) and store.exists(manifest.plan)
        whole = whole and (manifest.mix is None or _verifies(store, "pairs", manifest.mix))
    except (OSError, ValueError, KeyError, pa.ArrowException):  # damaged: made again
        return None
    return manifest if whole else None


def _verifies(store: Store, rows: RowKind, split: SplitManifest) -> bool:
    names = ["prompt", *ANSWERS[rows]]
    return split_digest([store.path(file) for file in split.files], names) == split.digest


class _Stage:
    """One run of the stage: what all its parts need."""

    def __init__(
        self,
        store: Store,
        spec: DataSpec,
        batch: BatchSpec,
        model_dir: Path,
        reporter: Reporter,
        directory: Path,
        key: str,
        stop: Callable[[], bool],
    ) -> None:
        self.store, self.spec, self.batch, self.reporter = store, spec, batch, reporter
        self.directory, self.key, self.model_dir = directory, key, model_dir
        self.scratch = directory / "scratch"
        self.stop = stop
        self.tokenizer = Tokenizer.load(model_dir)

    def run(
        self,
        scorer: ScorerFactory | None,
        reference_digest: str | None,
        scored_as: Mapping[str, Any] | None,
        resources: ResourceSpec,
    ) -> DatasetManifest:
        train, validation, made, held = self._splits()
        if scorer is not None:
            for split in [train, validation] if validation is not None else [train]:
                self._add_reference(split, scorer, reference_digest, scored_as, resources)
        mix = self._mix(held)
        plan = self._plan(train)
        if isinstance(plan, BatchPlan):
            write_plan(plan, self.directory / PLAN)
        else:
            write_order(plan, self.directory / PLAN)
        return DatasetManifest(
            rows=self.spec.rows,
            train=train,
            validation=validation,
            mix=mix,
            report=made,
            plan=f"{self.key}/{PLAN}",
            steps_per_epoch=plan.steps_per_epoch,
            total_steps=plan.total_steps,
            tokenizer_digest=self.tokenizer.digest,
            template_digest=self.tokenizer.template_digest,
            reference_digest=reference_digest if scorer is not None else None,
        )

    def _splits(self) -> tuple[SplitManifest, SplitManifest | None, DatasetReport, Facts | None]:
        """The rows to train on, those held out, the report on the former, and the latter's facts."""
        spec = self.spec
        validation = self._encode("validation_file", spec.validation_file, spec.validation_name)
        training = self._encode("training_file", spec.training_file, spec.training_name)
        assert training is not None
        held = validation.facts if validation is not None else None
        prompts = spec.rows in PROMPT_KINDS
        facts = decide(training.facts, deduplicate=spec.deduplicate, validation=held, held_prompts=prompts)
        training = EncodedFile(training.found, training.path, facts)
        made = report(facts, training.found)
        require_rows(made, spec.training_name)
        kept: Mask = facts["reason"] == 0
        if validation is not None:
            return self._write("train", training, kept), self._write_validation(validation), made, held
        if spec.eval_split == 0:
            return self._write("train", training, kept), None, made, None
        out = hold_out(facts, spec.eval_split, spec.seed)
        train, validated = self._write("train", training, kept & ~out), self._write("validation", training, out)
        return train, validated, made, facts[out]

    def _mix(self, held: Facts | None) -> SplitManifest | None:
        """The pairs to train on among sampled ones, without those of held-out prompts."""
        as_pairs = self.spec.model_copy(update={"rows": "pairs", "answer_room": 0})
        encoded = self._encode("mix.file", self.spec.mix_file, self.spec.mix_name, as_pairs)
        if encoded is None:
            return None
        facts = decide(encoded.facts, deduplicate=self.spec.deduplicate, validation=held, held_prompts=True)
        require_rows(report(facts, encoded.found), self.spec.mix_name or "mix.file")
        return write_split(
            "mix", EncodedFile(encoded.found, encoded.path, facts), facts["reason"] == 0, self.directory, self.key
        )

    def _encode(
        self, field: str, key: str | None, name: str | None, spec: DataSpec | None = None
    ) -> EncodedFile | None:
        if key is None:
            return None
        path = self.store.path(key)
        try:
            return encode_file(
                path,
                name or path.name,
                spec or self.spec,
                model_dir=self.model_dir,
                scratch=self.scratch / field,
                progress=self._progress(field),
            )
        except InvalidData as error:
            error.param = error.param or field
            raise

    def _progress(self, field: str) -> Progress:
        def tell(stage: str, done: int, total: int) -> None:
            of = f" of {total:,}" if total > done else ""
            self._tell(stage, done, total, f"{stage} the {field.replace('_', ' ')}: {done:,}{of} rows")

        return tell

    def _tell(self, stage: str, done: int, total: int, text: str) -> None:
        """Every long part comes by here between two pieces of its work, so here is where it can be left."""
        self.reporter.progress(stage, done, total, text)
        if self.stop():
            raise StopAsked(f"asked to stop while {text}")

    def _write_validation(self, encoded: EncodedFile) -> SplitManifest:
        facts = decide(encoded.facts, deduplicate=self.spec.deduplicate)
        made = report(facts, encoded.found)
        require_rows(made, self.spec.validation_name or "validation_file", minimum=1)
        return self._write("validation", EncodedFile(encoded.found, encoded.path, facts), facts["reason"] == 0)

    def _write(self, name: str, encoded: EncodedFile, members: Mask) -> SplitManifest:
        if self.spec.rows == "unpaired":
            target = self.scratch / f"mismatched-{name}.parquet"
            encoded = with_mismatched(encoded, members, self.spec.seed, self.spec.max_length, target)
        return write_split(name, encoded, members, self.directory, self.key)

    def _paths(self, split: SplitManifest) -> list[Path]:
        """Where the split's files lie until they are published."""
        return [self.directory / Path(file).name for file in split.files]

    def _add_reference(
        self,
        split: SplitManifest,
        scorer: ScorerFactory,
        reference_digest: str | None,
        scored_as: Mapping[str, Any] | None,
        resources: ResourceSpec,
    ) -> None:
        key = None
        if reference_digest is not None and scored_as is not None:
            key = cache_key(
                reference=reference_digest,
                tokenizer=self.tokenizer.digest,
                template=self.tokenizer.template_digest,
                rows=split.digest,
                max_length=self.spec.max_length,
                **scored_as,
            )

        def tell(done: int, total: int) -> None:
            text = f"reference log-probabilities of the {split.name} split: {done:,} of {total:,} rows"
            self._tell("reference", done, total, text)

        files = self._paths(split)
        values = reference_logps(
            self.store,
            files,
            split.rows,
            answers=ANSWERS[self.spec.rows],
            key=key,
            scorer=scorer,
            resources=resources,
            progress=tell,
        )
        add_columns(files, ANSWERS[self.spec.rows], values)

    def _plan(self, train: SplitManifest) -> BatchPlan | PromptOrder:
        if train.rows < max(MIN_ROWS, self.batch.batch_size):
            raise InvalidSpec(
                f"batch_size is {self.batch.batch_size} and only {train.rows} rows are left to train on; choose a "
                "smaller batch_size, or add rows",
                param="batch_size",
            )
        batch, spec = self.batch, self.spec
        if spec.rows in PROMPT_KINDS:
            return PromptOrder(train.rows, batch.batch_size, batch.n_epochs, batch.max_steps, spec.shuffle, spec.seed)
        lengths = row_lengths(self._paths(train), spec.rows)
        return BatchPlan(
            train.rows, batch.batch_size, batch.n_epochs, batch.max_steps, spec.shuffle, spec.seed, lengths
        )


def row_lengths(files: list[Path], rows: RowKind) -> NDArray[np.int64]:
    """Tokens of each row: prompt and answers."""
    names = ["prompt", *ANSWERS[rows]]
    parts = []
    for path in files:
        table = pq.read_table(path, columns=names)
        parts.append(sum(table[name].combine_chunks().value_lengths().to_numpy().astype(np.int64) for name in names))
    return np.concatenate(parts)


def write_plan(plan: BatchPlan, path: Path) -> None:
    """The plan as a table: step, epoch, rows (indices of the training split). A record; training rebuilds it."""
    schema = pa.schema([("step", pa.int64()), ("epoch", pa.int32()), ("rows", pa.list_(pa.int64()))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, plan.total_steps, plan.steps_per_epoch):
            steps = range(start, min(start + plan.steps_per_epoch, plan.total_steps))
            columns = [list(steps), [start // plan.steps_per_epoch] * len(steps), [plan.rows(step) for step in steps]]
            writer.write_table(pa.table(columns, schema=schema))


def write_order(order: PromptOrder, path: Path) -> None:
    """The order of the first epoch as a table: position, row. A record; the loop rebuilds it."""
    positions = np.arange(order.n_rows)
    pq.write_table(pa.table({"position": positions, "row": [order.row(int(place)) for place in positions]}), path)
