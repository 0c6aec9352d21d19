"""What each idea of the training step is worth: the plain computation, and one idea after the other added to it.

    python -m benchmarks.ablation [--rows short|long] [--rounds 3] [--batch 8]

    plain       a sequence a row, padded; all logits at once, of every token; the reference computed beside the policy
    cached      ... the reference's log-probabilities known beforehand
    restricted  ... logits only where a token of an answer is predicted
    chunked     ... a chunk of them at a time, computed again in the backward pass
    packed      ... all sequences in one row, without padding
    shared      ... the prompt once a pair: what a job runs

All variants compute one micro-batch forward and backward, with the same loss, in one process and by turns.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.workload import Setting, make_model, make_rows, options_of, setting_of


def variants(model: Any, examples: list[Any]) -> dict[str, Callable[[], Any]]:
    """By name, what computes the log-probabilities of all answers, the chosen ones first."""
    import torch

    from dpo_service.train.batch import collate, padded
    from dpo_service.train.head import logit_logps
    from dpo_service.train.logprobs import completion_logps
    from dpo_service.train.rows import Example

    shared = collate(examples)
    apart = collate(
        [Example(prompt=e.prompt, chosen=e.chosen) for e in examples]
        + [Example(prompt=e.prompt, chosen=e.rejected) for e in examples]
    )
    plain = padded(shared)

    def every_logit() -> Any:
        logits_BLV = model(
            input_ids=plain.input_ids_BL,
            attention_mask=plain.attention_mask_BL,
            position_ids=plain.position_ids_BL,
            use_cache=False,
        ).logits
        logps_BL = logit_logps(logits_BLV.flatten(0, 1), plain.input_ids_BL.roll(-1, 1).flatten()).logps_C
        return torch.zeros(plain.sequences).index_add(0, plain.owner_C, logps_BL[plain.source_C])

    def with_reference() -> Any:
        with torch.no_grad():
            reference_S = every_logit()
        return every_logit() - reference_S

    return {
        "plain": with_reference,
        "cached": every_logit,
        "restricted": lambda: completion_logps(model, plain, chunk=len(plain.target_C)).logps_S,
        "chunked": lambda: completion_logps(model, plain).logps_S,
        "packed": lambda: completion_logps(model, apart).logps_S,
        "shared": lambda: completion_logps(model, shared).logps_S,
    }


def measure(setting: Setting) -> dict[str, dict[str, float]]:
    """By variant: median seconds, and the loss."""
    import pyarrow as pa
    from torch.nn.functional import logsigmoid

    from dpo_service.train.policy import load_model
    from dpo_service.train.rows import RowTable

    model = load_model(setting.model_dir)
    examples = RowTable(pa.table(make_rows(setting))).take(range(setting.batch))
    found: dict[str, dict[str, Any]] = {}
    for _ in range(setting.steps):
        for name, logps in variants(model, examples).items():
            entry = found.setdefault(name, {"times": []})
            model.zero_grad(set_to_none=True)
            started = time.perf_counter()
            chosen_P, rejected_P = logps().chunk(2)
            loss = -logsigmoid(0.1 * (chosen_P - rejected_P)).mean()
            loss.backward()
            entry["times"].append(time.perf_counter() - started)
            entry["loss"] = float(loss.detach())
    for entry in found.values():
        entry["seconds"] = statistics.median(entry.pop("times"))
    return found


def main() -> None:
    options = options_of(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(options, options.rounds, Path(folder))
        import torch

        torch.set_num_threads(options.threads)
        make_model(setting.model_dir, setting.vocabulary)
        found = measure(setting)
    worth, before = {}, None
    print(f"{'':11} {'seconds':>8} {'gain':>6}")
    for name, entry in found.items():
        worth[name] = before / entry["seconds"] if before else 1.0
        before = entry["seconds"]
        print(f"{name:11} {entry['seconds']:8.2f} {worth[name]:5.2f}x")
    plain, ours = found["plain"]["seconds"], found["shared"]["seconds"]
    print(f"{plain / ours:.2f} times as fast in all")
    entry = {"unit": "seconds forward and backward", "ours": ours, "peer": plain, "ratio": plain / ours}
    results.record(options.json, f"ablation/{setting.rows}", entry | {"variants": found, "gain": worth})


if __name__ == "__main__":
    main()
