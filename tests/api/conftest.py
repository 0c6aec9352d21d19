"""The API in memory: a real database and store, a fake cluster, and the official client on top."""

import json

import httpx
import openai
import pytest

from dpo_service.api.app import create_app
from dpo_service.clock import FakeClock
from dpo_service.cluster.fake import FakeCluster
from dpo_service.db.session import Database
from dpo_service.settings import Settings
from dpo_service.storage.store import Store
from tests.databases import make_tables
from tests.models import save_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def save_model(directory, *, chat_template=True, **config):
    """What the control plane reads of a model; the weights are a file of no tensors."""
    options = {} if chat_template else {"chat_template": None}
    save_tokenizer(directory, **options)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    header = b"{}"
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return directory


def pair(number):
    return {
        "input": {"messages": [{"role": "user", "content": f"Which colour has house number {number}?"}]},
        "preferred_output": [{"role": "assistant", "content": f"House {number} is red."}],
        "non_preferred_output": [{"role": "assistant", "content": "I do not know."}],
    }


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def pairs(count=16):
    return lines(pair(number) for number in range(count))


class Api:
    """The parts, and two clients: `http` as anybody, `sdk` as the official library with strict validation."""

    def __init__(self, data_dir, **settings):
        self.settings = Settings(data_dir=data_dir, hub=False, **{"inspect_models": False} | settings)
        data_dir.mkdir(parents=True, exist_ok=True)
        self.store = Store(data_dir)
        self.database = Database(self.settings.sqlalchemy_url)
        self.cluster = FakeCluster()
        self.clock = FakeClock()
        self.changes = 0
        self.app = create_app(
            self.settings, self.database, self.store, self.cluster, on_change=self._changed, clock=self.clock
        )
        self.http = self.client()
        self.sdk = openai.AsyncOpenAI(
            base_url="http://localhost/v1",
            api_key="any",
            max_retries=0,
            http_client=self.client(),
            _strict_response_validation=True,
        )

    def client(self, **options):
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", **options)

    def _changed(self):
        self.changes += 1

    async def upload(self, content=None, name="pairs.jsonl"):
        return await self.sdk.files.create(file=(name, pairs() if content is None else content), purpose="fine-tune")

    async def job(self, file_id, **fields):
        options = {"model": "tiny", "method": {"type": "dpo"}} | fields
        return await self.sdk.fine_tuning.jobs.create(training_file=file_id, **options)

    def stored(self):
        """Every file under the data directory's `files` and `uploads`, by key."""
        found = (p for area in ("files", "uploads") for p in (self.store.root / area).rglob("*"))
        return sorted(str(p.relative_to(self.store.root)) for p in found)


async def opened(api):
    await make_tables(api.database)
    return api


async def closed(api):
    await api.http.aclose()
    await api.sdk.close()
    await api.database.close()


@pytest.fixture
async def api(tmp_path):
    made = await opened(Api(tmp_path / "data"))
    save_model(tmp_path / "data" / "models" / "tiny")
    yield made
    await closed(made)
