"""Names of things. An id says what it names: `ftjob-…`, `file-…`, `ftckpt_…`, `dep-…`, `ft:…`."""

from __future__ import annotations

import re
import secrets

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


def random_suffix(length: int = 16) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def new_job_id() -> str:
    return f"ftjob-{random_suffix()}"


def new_file_id() -> str:
    return f"file-{random_suffix()}"


def new_event_id() -> str:
    return f"ftevent-{random_suffix(20)}"


def new_deployment_id() -> str:
    return f"dep-{random_suffix(12)}"


def submission_id(job_id: str, attempt: int) -> str:
    """The Ray submission id of an attempt: a function of its arguments, so that asking twice starts one job.

    No "/" (Ray Jobs keeps such ids PENDING for ever); at most 47 characters (KubeRay's limit for a RayJob).
    """
    return f"dpo-{job_id.removeprefix('ftjob-')}-{attempt}"


def checkpoint_id(job_id: str, step: int) -> str:
    return f"ftckpt_{job_id.removeprefix('ftjob-')}_{step}"


def slug(text: str, length: int = 40) -> str:
    """`text` as lower-case letters, digits and dashes, at most `length` characters, never empty."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-") or "model"


def fine_tuned_model_id(base: str, suffix: str | None, job_id: str) -> str:
    """`ft:{base}:{suffix}:{job}`, OpenAI's shape; `base` is reduced to its last path component."""
    name = slug(base.removeprefix("ft:").split(":")[0].rstrip("/").split("/")[-1])
    return f"ft:{name}:{slug(suffix) if suffix else ''}:{job_id.removeprefix('ftjob-')}"


def checkpoint_model_id(model_id: str, step: int) -> str:
    return f"{model_id}:ckpt-step-{step}"
