"""One served model: a Ray Serve deployment around vLLM's AsyncLLM, behind vLLM's own OpenAI routes.

    HTTP ── Serve's proxy ──> ModelReplica: [names its checkpoint] ── vLLM's ASGI app ── AsyncLLM (weights, cache)

Serve's REST API loads it as `dpo_service.serve.app:build` with a ServeSpec as `args`. (`ray.serve.llm` does the same in
three times the time and memory on a CPU.) Nothing heavy is imported before a replica starts: Serve imports this module
in two processes, and only one of them needs vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from starlette.types import ASGIApp

from dpo_service.checkpoint.probe import read_probe
from dpo_service.serve import engine, inprocess, provenance, scratch
from dpo_service.serve.verify import verify
from dpo_service.specs.serve import ServeSpec
from dpo_service.storage.hub import fetch_model

DEPLOYMENT_NAME = "Model"


class ModelReplica:
    """A replica. `spec` is a ServeSpec as JSON."""

    async def __init__(self, spec: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        scratch.use_own()
        try:
            await self._start(ServeSpec.model_validate(spec))
        except BaseException:
            scratch.remove_own()
            raise

    async def _start(self, spec: ServeSpec) -> None:
        self.spec = spec
        model_dir = await asyncio.to_thread(locate, spec.model_path)
        # Before the engine: a model that is not the published one is refused in a second, and never loaded.
        self.digest = await asyncio.to_thread(provenance.identify, model_dir, spec.checkpoint_digest)
        self._start_engine(model_dir)
        try:
            await verify(self.engine, read_probe(model_dir))
        except BaseException:
            self.engine.shutdown()
            raise

    def _start_engine(self, model_dir: Path) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        engine_args = AsyncEngineArgs(**engine.engine_options(self.spec, model_dir))
        frontend = FrontendArgs(disable_fastapi_docs=True)
        self.arguments = argparse.Namespace(**(vars(frontend) | vars(engine_args)))
        start = AsyncLLM.from_engine_args if self.spec.engine.gpus else inprocess.async_llm
        self.engine = start(engine_args)

    def _stop_engine(self) -> None:
        self.engine.shutdown()
        scratch.remove_own()

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """The app Serve puts HTTP into; called once, after the constructor."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        self.arguments.fingerprint_mode, self.arguments.fingerprint_value = "custom", self.digest
        tasks = await self.engine.get_supported_tasks()
        app: FastAPI = build_app(self.arguments, supported_tasks=tasks, model_config=self.engine.model_config)
        await init_app_state(self.engine, app.state, self.arguments, tasks)
        # vLLM tells its uvicorn server to exit when the engine dies; here check_health() tells Serve.
        app.state.server = types.SimpleNamespace()
        headers = [
            (provenance.CHECKPOINT_HEADER, self.digest),
            (provenance.DEPLOYMENT_HEADER, self.spec.deployment_id),
        ]
        self._stop_engine_with(app)
        return provenance.NamesItsCheckpoint(app, headers)

    def _stop_engine_with(self, app: FastAPI) -> None:
        """Shut the engine down when the app's lifespan ends: Serve ends it as a replica's last act."""
        inner = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(asgi_app: FastAPI) -> AsyncIterator[None]:
            try:
                async with inner(asgi_app):
                    yield
            finally:
                self._stop_engine()

        app.router.lifespan_context = lifespan

    async def check_health(self) -> None:
        """Raises when the engine has died; Serve then replaces the replica."""
        await self.engine.check_health()


def build(args: dict[str, Any]) -> serve.Application:
    """Application builder for Serve's declarative API.

    Args:
        args: a ServeSpec, as JSON.
    """
    spec = ServeSpec.model_validate(args)
    deployment = serve.deployment(
        serve.ingress()(ModelReplica),
        name=DEPLOYMENT_NAME,
        ray_actor_options=engine.actor_options(spec.engine),
        max_ongoing_requests=256,
        # A start takes many seconds and fails mostly for reasons that stay: two tries, not Serve's twenty.
        max_constructor_retry_count=2,
        health_check_period_s=5,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=20,
    )
    return deployment.bind(spec.model_dump(mode="json"))


def locate(model_path: str) -> Path:
    """The model's directory: `model_path` itself, or for a hub id a local copy, fetched if need be.

    Raises:
        TrainingError: the hub does not deliver it.
    """
    if os.path.isabs(model_path):
        return Path(model_path)
    return fetch_model(model_path)
