"""The tables of docs/performance.md and docs/models.md, from the results that the benchmarks wrote.

python -m benchmarks.report
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import families, results

MODELS_PAGE = Path(__file__).parent.parent / "docs" / "models.md"
FAMILIES_BEGIN, FAMILIES_END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
GPU_RESULTS = Path(__file__).with_name("gpu_results.json")
GPU_BEGIN, GPU_END = "<!-- gpu: begin -->\n", "<!-- gpu: end -->\n"
BEGIN, END = "<!-- benchmarks: begin -->\n", "<!-- benchmarks: end -->\n"


def table(entries: dict[str, dict[str, Any]]) -> str:
    """One row a benchmark: ours, the peer's, the ratio (above 1: ours is better), and what else was measured."""
    lines = ["| benchmark | ours | peer | ratio | unit | besides |", "|---|--:|--:|--:|---|---|"]
    for name, entry in sorted(entries.items()):
        figures = [_figure(entry.get(key)) for key in ("ours", "peer", "ratio")]
        lines.append(f"| {name} | {' | '.join(figures)} | {entry.get('unit', '')} | {_besides(entry)} |")
    machines = sorted({f"{entry['machine']} ({_versions(entry)})" for entry in entries.values()})
    return "\n".join([*lines, "", *(f"Measured on {machine}.\n" for machine in machines)])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _besides(entry: dict[str, Any]) -> str:
    said = []
    if "memory_ratio" in entry:
        peaks = entry["peak_gigabytes"]
        said.append(f"peak {peaks['ours']:.2f} against {peaks['TRL']:.2f} GB ({entry['memory_ratio']:.2f})")
    if "utilisation" in entry:
        said.append(f"{entry['utilisation']:.0%} of torch.mm's {entry['mm_gigaflops']:.0f} GFLOP/s")
    if "largest_loss_difference" in entry:
        said.append(f"losses within {entry['largest_loss_difference']:.0e}")
    if "largest_error" in entry:
        said.append(f"planned memory within {entry['largest_error']:.0%} of measured, {len(entry['cases'])} settings")
    if "gain" in entry:
        said.append(", ".join(f"{name} {gain:.2f}x" for name, gain in entry["gain"].items() if name != "plain"))
    if "share_of_step_time" in entry:
        shares = entry["share_of_step_time"], entry["setting"]["steps"]
        said.append(f"{shares[0]['ours']:.1%} of the time of {shares[1]} steps")
    if "of_plain" in entry:
        said.append(f"{entry['of_plain']:.0%} of the peer without seeds and log-probabilities")
    if "sampler" in entry:
        said.append(f"our sampler without the curator {entry['sampler']:.0%}")
    if "longer" in entry:
        ahead, turns = (entry["seconds"][staleness] for staleness in ("1", "0"))
        said.append(
            f"a step takes {ahead['step']:.2f} s; by turns sampling and judging take "
            f"{turns['sample'] + turns['judge']:.2f} s, training {turns['train']:.2f} s, both {turns['step']:.2f} s"
        )
    if "reward_within" in entry:
        said.append(f"base {entry['base_reward']:.2f}")
        for budget, rewards in entry["reward_within"].items():
            figures = ", ".join(f"{name} {reward:.2f}" for name, reward in rewards.items())
            said.append(f"within {budget} nats {figures}")
    if "publish_s" in entry:
        said.append(f"{entry['parameters'] / 1e6:.1f}M parameters, {entry['publish_s']:.3f} s of it to publish")
    if "around_the_steps" in entry:
        said.append(f"{entry['around_the_steps']:.0f} s around {entry['stages']['steps']:.0f} s of steps")
    return "; ".join(said)


def _versions(entry: dict[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in sorted(entry["versions"].items()))


def render(page: str, entries: dict[str, dict[str, Any]]) -> str:
    """`page` with the table of `entries` between its marks."""
    return _between(page, BEGIN, table(entries), END)


def render_families(page: str, found: dict[str, Any]) -> str:
    """`page` with the table of families between its marks."""
    return _between(page, FAMILIES_BEGIN, families.table(found), FAMILIES_END)


def _between(page: str, begin: str, text: str, end: str) -> str:
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}{text}{end}{tail}"


def gpu_table(found: dict[str, Any]) -> str:
    """Steps, then parts, of one card."""
    lines = ["| model | pairs of | way | pairs/s | tokens/s | TFLOP/s | of torch.mm | peak GB |"]
    lines.append("|---|--:|---|" + "--:|" * 5)
    for entry in found["entries"]:
        start = f"| {entry['model']} | {entry['length']:,} | {entry['way']} |"
        if "failed" in entry:
            lines.append(f"{start} not measured: {entry['failed'].partition(';')[0]} |||||")
            continue
        figures = (
            f"{entry['pairs_per_second']:.2f} | {entry['tokens_per_second']:,.0f} | {entry['tflops']:.0f} | "
            f"{entry['utilisation']:.0%} | {entry['peak_gigabytes']:.0f} |"
        )
        lines.append(f"{start} {figures}")
    lines += ["", "| part | way | ms | TFLOP/s |", "|---|---|--:|--:|"]
    for part in found["parts"]:
        rate = "" if part["part"] == "adamw" else f"{part['tflops']:.0f}"
        lines.append(f"| {part['part']} | {part['way']} | {part['milliseconds']:.2f} | {rate} |")
    device = f"{found['device']}, torch.mm in bfloat16 {found['matrix_rate'] / 1e12:.0f} TFLOP/s"
    return "\n".join([*lines, "", f"Measured on one {device} ({_versions(found)}).\n"])


def render_gpu(page: str, found: dict[str, Any]) -> str:
    """`page` with the table of a GPU's results between its marks."""
    return _between(page, GPU_BEGIN, gpu_table(found), GPU_END)


def main() -> None:
    page = render(PAGE.read_text(), json.loads(results.DEFAULT.read_text()))
    PAGE.write_text(render_gpu(page, json.loads(GPU_RESULTS.read_text())))
    MODELS_PAGE.write_text(render_families(MODELS_PAGE.read_text(), json.loads(families.RESULTS.read_text())))
    print(table(json.loads(results.DEFAULT.read_text())))


if __name__ == "__main__":
    main()
