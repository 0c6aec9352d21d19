"""Checks of a model directory against transformers: configuration, names and shapes of weights, tokenizer, adapters.

    control plane:  registry/inspection.py ── subprocess, JSON ──> python -m dpo_service.inspection
    job:            runner ── in process ──> inspect

Both run `inspect`. The control plane never imports torch, so it asks a process of its own; where transformers is not
installed there, the job's own inspection is the first.
"""
