"""The table of docs/performance.md, from the results that the benchmarks wrote.

python -m benchmarks.report
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import results

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
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
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}{table(entries)}{END}{tail}"


def main() -> None:
    PAGE.write_text(render(PAGE.read_text(), json.loads(results.DEFAULT.read_text())))
    print(table(json.loads(results.DEFAULT.read_text())))


if __name__ == "__main__":
    main()
