"""What of a file does not suit the loss, though it can be trained on."""

from __future__ import annotations

from dpo_service.manifests.dataset import DatasetReport
from dpo_service.specs.loss import LossSpec

LOWEST, HIGHEST = 1.0, 4 / 3
"""Where KTO's authors keep desirable_weight n_desirable / (undesirable_weight n_undesirable), arXiv:2402.01306."""


def notes(report: DatasetReport, loss: LossSpec) -> list[str]:
    """What to tell the user before the file is trained on with `loss`."""
    found = [imbalance(report, loss)]
    if report.judged and not loss.has("sppo"):
        found.append(f"{report.judged:,} pairs have a chosen_probability, which no loss but 'sppo' looks at")
    return [note for note in found if note is not None]


def imbalance(report: DatasetReport, loss: LossSpec) -> str | None:
    """What to tell the user where one side outweighs the other, with the weight that mends it."""
    if loss.name != "kto" or report.desirable is None or report.undesirable is None:
        return None
    if not report.desirable or not report.undesirable:
        side = "undesirable" if report.desirable else "desirable"
        return f"no answer is {side}; KTO learns from the contrast of both kinds"
    ratio = loss.desirable_weight * report.desirable / (loss.undesirable_weight * report.undesirable)
    if LOWEST - 1e-9 <= ratio <= HIGHEST + 1e-9:
        return None
    low, high = (bound * loss.undesirable_weight * report.undesirable / report.desirable for bound in (LOWEST, HIGHEST))
    return (
        f"desirable answers weigh {ratio:.2f} times what undesirable ones do ({report.desirable:,} times "
        f"{loss.desirable_weight:g} against {report.undesirable:,} times {loss.undesirable_weight:g}); the authors of "
        f"KTO advise 1 to 1.33, here a desirable_weight of {low:.2f} to {high:.2f}"
    )
