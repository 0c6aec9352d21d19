"""Where a model's positions are computed in another way by the engine that serves it than by the one that trains it."""

from __future__ import annotations

from dpo_service.inspection.subject import Subject


def look(subject: Subject) -> None:
    """A note for frequencies that depend on a sequence's length. Training follows transformers: each sequence has those
    of its own length. vLLM has one set for all sequences of an engine, longrope's long one or dynamic NTK's unscaled
    one."""
    from dpo_service.train.rope import length_dependent

    kinds = next((kinds for _, _, kinds in length_dependent(subject.shell)), None)
    if kinds is None:
        return
    if kinds.one_beyond:
        engine = f"uses the long frequencies for every sequence if its max_model_len is over {kinds.same_to}"
    else:
        engine = "uses the frequencies of short sequences for all"
    subject.notes.append(
        f"The model's rotary frequencies change for sequences over {kinds.same_to} tokens. Training computes each "
        f"sequence as transformers computes it alone; vLLM, which samples and serves, {engine}. To train what is "
        f"served, keep max_length and engine.max_model_len at {kinds.same_to} tokens or less"
    )
