"""A real service on the session's one Ray: `dpo up` in a process of its own, driven from outside."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import psutil
import pytest

COLOURS = ["red", "green", "blue", "black", "white", "pink", "grey", "brown"]
THINGS = ["cat", "dog", "boat", "tree", "house", "lamp", "chair", "stone"]
ENDED = {"succeeded", "failed", "cancelled"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Service:
    """`dpo up` on one data directory; may be killed and brought up again."""

    def __init__(self, data_dir):
        self.data_dir, self.port = data_dir, free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def dpo(self, *arguments, check=True, timeout=300):
        command = [sys.executable, "-m", "dpo_service.cli", *arguments, "--data-dir", str(self.data_dir)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        if check:
            assert result.returncode == 0, f"{arguments}: {result.stdout}\n{result.stderr}"
        return result

    def up(self):
        return self.dpo("up", "--detach", "--port", str(self.port))

    @property
    def pid(self):
        return json.loads((self.data_dir / "service.json").read_text())["pid"]

    def kill(self):
        process = psutil.Process(self.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)

    def client(self, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", timeout=120, **options)

    def wait(self, job_id, until=ENDED, timeout=180):
        """Poll until the job's status is in `until`."""
        client, deadline = self.client(), time.monotonic() + timeout
        while time.monotonic() < deadline:
            job = client.fine_tuning.jobs.retrieve(job_id)
            if job.status in until:
                return job
            assert job.status not in ENDED, f"{job.status}: {job.error}"
            time.sleep(0.3)
        raise AssertionError(f"{job_id} is still {job.status}:\n{self.logs(job_id)}")

    def wait_for_state(self, job_id, state, timeout=60):
        """Poll until our own, finer word for where the job stands is `state`."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            job = self.client().fine_tuning.jobs.retrieve(job_id)
            if job.model_extra["state"] == state:
                return job
            assert job.status not in ENDED, f"{job.status}: {job.error}"
            time.sleep(0.3)
        raise AssertionError(f"{job_id} is still {job.model_extra['state']}:\n{self.logs(job_id)}")

    def logs(self, job_id):
        return httpx.get(f"{self.url}/v1/fine_tuning/jobs/{job_id}/logs", trust_env=False).text

    def events(self, job_id):
        """All events, oldest first."""
        return list(self.client().fine_tuning.jobs.list_events(job_id, limit=100))[::-1]

    def steps(self, job_id, split="train"):
        """The steps of which metrics were reported, in the order they arrived."""
        events = [e for e in self.events(job_id) if e.type == "metrics"]
        return [e.data["step"] for e in events if e.data["split"] == split]

    def wait_for_step(self, job_id, step, timeout=180):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if max(self.steps(job_id), default=0) >= step:
                return
            job = self.client().fine_tuning.jobs.retrieve(job_id)
            assert job.status not in ENDED, f"ended before step {step}: {job.status} {job.error}"
            time.sleep(0.3)
        raise AssertionError(f"step {step} never came:\n{self.logs(job_id)}")


@pytest.fixture(scope="session")
def service(ray_cluster):
    from dpo_service.main import _terminate

    service = Service(ray_cluster.data_dir)
    service.up()
    yield service
    _terminate(service.pid)


@pytest.fixture(scope="session")
def client(service):
    return service.client()


@pytest.fixture(scope="session")
def tiny_model(service, tmp_path_factory):
    """The name of a random two-layer Llama with a chat template, in the service's models directory."""
    from tests.models import save_tiny_llama

    save_tiny_llama(service.data_dir / "models" / "tiny")
    return "tiny"


def pair(rng):
    colour, other, thing = rng.choice(COLOURS), rng.choice(COLOURS), rng.choice(THINGS)
    question = f"Which colour has the {colour} {thing} number {rng.randrange(10_000)}?"
    return {
        "input": {"messages": [{"role": "user", "content": question}]},
        "preferred_output": [{"role": "assistant", "content": f"The {thing} is {colour}."}],
        "non_preferred_output": [{"role": "assistant", "content": f"It may be {other} or so."}],
    }


def pairs_file(path, rows, seed=0):
    rng = random.Random(seed)
    path.write_text("".join(json.dumps(pair(rng)) + "\n" for _ in range(rows)))
    return path


@pytest.fixture(scope="session")
def pairs(client, tmp_path_factory):
    """The id of an uploaded file of 64 pairs."""
    path = pairs_file(tmp_path_factory.mktemp("data") / "pairs.jsonl", 64)
    return client.files.create(file=path, purpose="fine-tune").id


def dpo(**hyperparameters):
    return {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
