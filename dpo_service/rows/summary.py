"""A dataset report as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_service.manifests.dataset import DatasetManifest, DatasetReport, LengthStats
from dpo_service.rows.formats import BY_NAME


def summary(report: DatasetReport, manifest: DatasetManifest | None = None) -> str:
    """The report in a few lines of text; with the manifest, also how rows were split and how many steps they make."""
    return "\n".join(_lines(report, manifest))


def _lines(report: DatasetReport, manifest: DatasetManifest | None) -> Iterator[str]:
    yield f"{report.kept:,} of {report.rows:,} rows kept ({BY_NAME[report.format].title})"
    for drop in report.dropped:
        where = f" (first on line {drop.first_line})" if drop.first_line is not None else ""
        yield f"  left out: {drop.count:,} {drop.reason.replace('_', ' ')}{where}"
    if manifest is not None:
        validation = f", {manifest.validation.rows:,} to validate" if manifest.validation else ""
        yield f"{manifest.train.rows:,} rows to train{validation}; {manifest.total_steps:,} steps"
    if report.desirable is not None:
        yield f"{report.desirable:,} desirable answers, {report.undesirable:,} undesirable"
    if report.references is not None:
        yield f"{report.references:,} prompts have a reference answer"
    for name in ("prompt", "chosen", "rejected", "answer"):
        stats: LengthStats | None = getattr(report, f"{name}_tokens")
        if stats is not None:
            most = f"95% {stats.p95:,}, longest {stats.max:,}"
            yield f"{name} tokens: mean {stats.mean:,.0f}, median {stats.p50:,}, {most}"
    if report.truncated_prompts or report.truncated_answers:
        yield f"truncated: {report.truncated_prompts:,} prompts, {report.truncated_answers:,} answers"
    if report.longer_chosen_share is not None:
        yield f"the chosen answer is the longer one in {report.longer_chosen_share:.0%} of the pairs"
    for warning in report.warnings:
        yield f"note: {warning}"
