"""The smallest application of Ray Serve that shows what it was given. Imported by Serve's replicas."""

from __future__ import annotations

import os
from typing import Any

from ray import serve


@serve.deployment(
    name="Model",
    ray_actor_options={"num_cpus": 0.1},
    graceful_shutdown_wait_loop_s=0.1,
    graceful_shutdown_timeout_s=1.0,
)
class Echo:
    def __init__(self, name: str) -> None:
        self.seen: dict[str, Any] = {"pid": os.getpid(), "name": name, "planet": os.environ["PLANET"], "version": None}

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.seen["version"] = user_config["version"]

    async def __call__(self) -> dict[str, Any]:
        return self.seen


def build(args: dict[str, str]) -> Any:
    return Echo.bind(args["name"])
