"""The deployments' parts with a fake cluster and a clock that stands still."""

import json

import pytest

from dpo_service.clock import FakeClock
from dpo_service.cluster.fake import FakeCluster
from dpo_service.db.session import Database
from dpo_service.deployments import repository, service
from dpo_service.deployments.reconciler import DeploymentReconciler
from dpo_service.settings import Settings
from dpo_service.specs.serve import EngineRequest
from dpo_service.storage.store import Store
from tests.databases import make_tables

CONFIG = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512, "vocab_size": 300}


def save_model(directory, **config):
    """What the control plane reads of a model; the weights are a file of no tensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return directory


class CountingCluster(FakeCluster):
    """Remembers every list it was given."""

    lists: list

    async def serve(self, applications):
        await super().serve(applications)
        self.lists.append([app.name for app in applications])


class World:
    def __init__(self, data_dir):
        data_dir.mkdir()
        self.settings = Settings(data_dir=data_dir, hub=False, reconcile_every_s=0.01)
        self.store = Store(data_dir)
        self.database = Database(self.settings.sqlalchemy_url)
        self.cluster = CountingCluster()
        self.cluster.lists = []
        self.clock = FakeClock()
        self.restart()

    def restart(self):
        """The service's process dies; the cluster and the database do not."""
        self.reconciler = DeploymentReconciler(self.database, self.store, self.cluster, self.settings, self.clock)

    async def tick(self, times=1):
        for _ in range(times):
            await self.reconciler.tick()

    async def create(self, model, **engine):
        return await service.create(
            model,
            EngineRequest(**engine),
            database=self.database,
            store=self.store,
            settings=self.settings,
            cluster=self.cluster,
            clock=self.clock,
        )

    async def deploy(self, model):
        self.clock.advance(1)  # so that the order of two is known
        row, _ = await self.create(model)
        return row.id

    async def delete(self, name):
        return await service.delete(name, database=self.database, clock=self.clock)

    async def row(self, name):
        async with self.database.begin() as session:
            return await repository.get(session, name)

    async def state(self, name):
        return (await self.row(name)).state


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path / "data")
    for name in ("one", "two"):
        save_model(tmp_path / "data" / "models" / name)
    await make_tables(made.database)
    yield made
    await made.database.close()
