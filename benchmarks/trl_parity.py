"""Step by step against TRL's DPOTrainer: the same rows, order, model and hyperparameters, float32 on the CPU.

    python -m benchmarks.trl_parity [--steps 20] [--reference cached|live]

Prints both runs' loss, gradient norm and reward metrics and the largest relative difference of each. A test
(tests/unit/train/test_trl_parity.py) holds it to 1e-4 for the loss.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

COMPARED = (
    "loss",
    "grad_norm",
    "learning_rate",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "num_tokens",
)
"""Not compared: rewards/accuracies, where TRL counts an exact tie 0 and we one half."""


@dataclass(frozen=True)
class Setting:
    reference: str = "cached"
    steps: int = 20
    batch_size: int = 8
    micro_batch_size: int = 4
    learning_rate: float = 3e-3
    beta: float = 0.1
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    lr_schedule: str = "linear"


Curve = list[dict[str, float]]


def run_trl(model_dir: Path, columns: dict[str, list], setting: Setting) -> Curve:
    """TRL's metrics by step. `columns`: prompt, chosen, rejected, lists of token ids."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class PreparedTrainer(DPOTrainer):
        """Takes rows that are token ids already, so that tokenisation is no part of what is compared."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, *_, **__):
            from torch.utils.data import SequentialSampler

            return SequentialSampler(self.train_dataset)

    rows = Dataset.from_dict({f"{name}_ids": columns[name] for name in ("prompt", "chosen", "rejected")})
    with tempfile.TemporaryDirectory() as scratch:
        config = DPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=setting.micro_batch_size,
            gradient_accumulation_steps=setting.batch_size // setting.micro_batch_size,
            max_steps=setting.steps,
            learning_rate=setting.learning_rate,
            lr_scheduler_type=setting.lr_schedule,
            warmup_steps=setting.warmup_ratio,
            weight_decay=setting.weight_decay,
            max_grad_norm=setting.max_grad_norm,
            beta=setting.beta,
            precompute_ref_log_probs=setting.reference == "cached",
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
        trainer = PreparedTrainer(
            model=model, ref_model=reference, args=config, train_dataset=rows, processing_class=tokenizer
        )
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]


def largest_difference(ours: Curve, theirs: Curve, name: str) -> float:
    """Largest |ours - theirs| over the larger of |theirs| and 1e-3 (rewards begin at 0)."""
    assert len(ours) == len(theirs)
    pairs = zip(ours, theirs, strict=True)
    return max(abs(a[name] - b[name]) / max(abs(b[name]), 1e-3) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--reference", choices=("cached", "live"), default="cached")
    options = parser.parse_args()
    from tests.unit.train.test_trl_parity import repeated_rows, run_ours
    from tests.unit.train.training_kit import build_model

    setting = Setting(reference=options.reference, steps=options.steps)
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = build_model(Path(scratch) / "model")
        columns = repeated_rows(setting)
        ours = run_ours(Path(scratch) / "job", model_dir, columns, setting)
        theirs = run_trl(model_dir, columns, setting)
    print(f"{'step':>4} {'loss, TRL':>12} {'loss, ours':>12} {'margin, TRL':>12} {'margin, ours':>12}")
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        print(
            f"{step:4d} {b['loss']:12.7f} {a['loss']:12.7f} {b['rewards/margins']:12.7f} {a['rewards/margins']:12.7f}"
        )
    for name in COMPARED:
        print(f"{name:18s} largest relative difference {largest_difference(ours, theirs, name):.1e}")


if __name__ == "__main__":
    main()
