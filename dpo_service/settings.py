"""How the service is set up: environment variables with the prefix DPO_, then these defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dpo_service.hosts import is_loopback


class Settings(BaseSettings):
    """All of it has defaults that run on one machine under one data directory."""

    model_config = SettingsConfigDict(env_prefix="DPO_", extra="ignore", frozen=True)

    data_dir: Path = Path.home() / ".dpo"
    host: str = "127.0.0.1"
    port: int = 8000
    database_url: str | None = None
    """SQLAlchemy URL; default: SQLite under the data directory."""
    api_keys: tuple[SecretStr, ...] = ()
    """Keys that admit; as DPO_API_KEYS='["sk-..."]'. None are needed on a loopback address."""
    allowed_model_roots: tuple[Path, ...] = ()
    """Directories, besides the data directory, from which a model may be named by path."""
    hub: bool = True
    """Whether models may be named by hub id (DPO_HUB=false, or HF_HUB_OFFLINE=1, turns it off)."""
    inspect_models: bool = True
    """Hold a model's files to transformers before a job on it is accepted, where transformers is installed. It takes
    seconds the first time a model is named; without it the job itself finds what is wrong."""
    cluster: Literal["local", "ray_jobs", "fake"] = "local"
    ray_address: str | None = None
    """Address of an existing cluster's dashboard (`ray_jobs`), e.g. http://head:8265."""
    local_cpus: int | None = None
    """CPUs the local Ray offers; default: all."""
    serve_port: int | None = None
    """Port of Ray Serve's HTTP proxy on the local cluster; default: a free one, remembered in the data directory."""
    max_upload_bytes: int = 8 << 30
    reconcile_every_s: float = Field(default=1.0, gt=0)
    lease_s: float = 30.0
    max_attempts: int = 3
    max_running_jobs: int = 4
    stop_grace_s: float = 60.0
    """A cancelled or paused job has so long to save and end by itself before it is ended by force."""

    @model_validator(mode="after")
    def _keys_off_loopback(self) -> Self:
        if not self.api_keys and not self.on_loopback:
            raise ValueError(
                f"host {self.host!r} can be reached from other machines and no API key is set up; "
                "set DPO_API_KEYS, or listen on 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _address_of_the_cluster(self) -> Self:
        if self.cluster == "ray_jobs" and self.ray_address is None:
            raise ValueError("an existing cluster (DPO_CLUSTER=ray_jobs) needs DPO_RAY_ADDRESS, as http://head:8265")
        return self

    @property
    def on_loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def sqlalchemy_url(self) -> str:
        return self.database_url or f"sqlite+aiosqlite:///{self.data_dir.resolve()}/service.db"
