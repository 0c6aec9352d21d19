"""Where everything lies, as storage keys. The one place that knows the layout.

files/{file_id}/{name}                      an uploaded file
uploads/{upload_id}/{part_id}               a part of a file that arrives in parts
jobs/{job_id}/attempts/{n}/attempt.json     what the runner is given (AttemptSpec)
jobs/{job_id}/attempts/{n}/result.json      how it ended (RunResult); absent = it died
jobs/{job_id}/attempts/{n}/spool/           reports, one file a process
jobs/{job_id}/attempts/{n}/stop             exists = the attempt is asked to stop at the next step
jobs/{job_id}/dataset/                      Parquet, batch plan, dataset.json (DatasetManifest)
jobs/{job_id}/samples/step-00000020.parquet what was sampled for a step, with verdicts (online/samples.py)
jobs/{job_id}/judge-spent.json              what its judge has cost, by all attempts (online/judges/spend.py)
jobs/{job_id}/weights/                      adapters on their way to samplers on GPUs, while the job runs
jobs/{job_id}/checkpoints/step-00000020/    a checkpoint (CheckpointManifest in manifest.json)
jobs/{job_id}/checkpoints/.keep-step-00000020   exists = somebody uses it, so it stays
models/{name}/                              the user's own base models
cache/starting.lock                         held by the online run that gathers samplers and workers (online/turn.py)
cache/reference/{digest}/                   reference log-probabilities, shared between jobs
"""

from __future__ import annotations

STARTING = "cache/starting.lock"


def file_key(file_id: str, name: str = "content") -> str:
    return f"files/{file_id}/{name}"


def upload_part(upload_id: str, part_id: str) -> str:
    return f"uploads/{upload_id}/{part_id}"


def job_dir(job_id: str) -> str:
    return f"jobs/{job_id}"


def attempt_dir(job_id: str, attempt: int) -> str:
    return f"jobs/{job_id}/attempts/{attempt}"


def attempt_spec(job_id: str, attempt: int) -> str:
    return f"{attempt_dir(job_id, attempt)}/attempt.json"


def attempt_result(job_id: str, attempt: int) -> str:
    return f"{attempt_dir(job_id, attempt)}/result.json"


def spool_dir(job_id: str, attempt: int) -> str:
    return f"{attempt_dir(job_id, attempt)}/spool"


def stop_flag(job_id: str, attempt: int) -> str:
    return f"{attempt_dir(job_id, attempt)}/stop"


def dataset_dir(job_id: str) -> str:
    return f"jobs/{job_id}/dataset"


def weights_dir(job_id: str) -> str:
    return f"jobs/{job_id}/weights"


def checkpoints_dir(job_id: str) -> str:
    return f"jobs/{job_id}/checkpoints"


def checkpoint_dir(job_id: str, step: int) -> str:
    return f"jobs/{job_id}/checkpoints/step-{step:08d}"


def keep_flag(checkpoint: str) -> str:
    """Of the checkpoint directory with this key."""
    parent, _, name = checkpoint.rpartition("/")
    return f"{parent}/.keep-{name}"


def samples_dir(job_id: str) -> str:
    return f"jobs/{job_id}/samples"


def samples_file(job_id: str, step: int) -> str:
    return f"{samples_dir(job_id)}/step-{step:08d}.parquet"


def judge_spent(job_id: str) -> str:
    return f"jobs/{job_id}/judge-spent.json"


def reference_cache(digest: str) -> str:
    return f"cache/reference/{digest}"


def user_model(name: str) -> str:
    return f"models/{name}"
