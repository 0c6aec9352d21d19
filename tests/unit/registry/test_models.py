"""What a model's name stands for."""

import json
import os
from datetime import UTC, datetime

import pytest

from dpo_service.db.session import Database
from dpo_service.errors import ModelNotFound, NotFound
from dpo_service.registry import hub, models
from dpo_service.registry.directories import NO_LENGTH, inspect
from dpo_service.settings import Settings
from dpo_service.storage.store import Store
from tests.databases import make_tables
from tests.models import save_no_weights

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def save(directory, template=None, **config):
    directory.mkdir(parents=True)
    values = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512, "vocab_size": 100}
    (directory / "config.json").write_text(json.dumps(values | config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    save_no_weights(directory)
    return directory


class Place:
    """A data directory, and one way to ask."""

    def __init__(self, root, **settings):
        root.mkdir(exist_ok=True)
        self.settings = Settings(data_dir=root, **{"hub": False} | settings)
        self.store = Store(root)
        self.database = Database(f"sqlite+aiosqlite:///{root}/test.db")

    async def resolve(self, name):
        return await models.resolve(name, database=self.database, store=self.store, settings=self.settings)


@pytest.fixture
async def place(tmp_path):
    made = Place(tmp_path / "data", allowed_model_roots=(tmp_path / "shared",))
    await make_tables(made.database)
    yield made
    await made.database.close()


async def publish(place, name, key, **fields):
    async with place.database.begin() as session:
        await models.publish(session, name, job_id="ftjob-a", key=key, digest="d", base="b", created_at=NOW, **fields)


async def test_published_model_and_its_checkpoint(place):
    save(place.store.root / "jobs/a/step-9/model")
    async with place.database.begin() as session:
        await models.publish_checkpoint(
            session, "ft:b::a", 9, job_id="a", key="jobs/a/step-9/model", digest="d9", base="b", created_at=NOW
        )
    facts = await place.resolve("ft:b::a:ckpt-step-9")
    assert facts.source.key == "jobs/a/step-9/model"
    assert facts.digest == "d9"
    assert facts.directory == place.store.root / "jobs/a/step-9/model"


async def test_publishing_again_moves_the_model(place):
    await publish(place, "ft:b::a", "jobs/a/1")
    await publish(place, "ft:b::a", "jobs/a/2")
    async with place.database.begin() as session:
        assert (await models.get(session, "ft:b::a")).key == "jobs/a/2"
        assert len(await models.list_published(session)) == 1


async def test_published_model_whose_files_are_gone(place):
    await publish(place, "ft:b::a", "jobs/a/gone")
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        await place.resolve("ft:b::a")


async def test_directory_by_name_and_by_path(place, tmp_path):
    save(place.store.root / "models" / "mine", template="{{ x }}")
    save(place.store.root / "models" / "org" / "mine")
    save(tmp_path / "shared" / "base")
    assert (await place.resolve("mine")).has_chat_template
    assert not (await place.resolve("org/mine")).has_chat_template
    facts = await place.resolve(str(tmp_path / "shared" / "base"))
    assert facts.source.path == str(tmp_path / "shared" / "base")
    assert (facts.max_length, facts.vocab_size, facts.weight_bytes) == (512, 100, 10)
    assert facts.architecture == "LlamaForCausalLM"


async def test_no_way_out_of_the_roots(place, tmp_path):
    outside = save(tmp_path / "secret" / "model")
    (place.store.root / "models").mkdir()
    os.symlink(outside, place.store.root / "models" / "link")
    for name in (str(outside), "link", "../../secret/model", str(place.store.root / ".." / "secret" / "model"), "a\0b"):
        with pytest.raises(ModelNotFound) as refused:
            await place.resolve(name)
        assert refused.value.param == "model"


async def test_path_outside_tells_not_whether_it_is_there(place, tmp_path):
    save(tmp_path / "secret")
    messages = []
    for name in ("secret", "absent"):
        with pytest.raises(ModelNotFound) as refused:
            await place.resolve(str(tmp_path / name))
        messages.append(refused.value.message.replace(name, "X"))
    assert messages[0] == messages[1]


async def test_link_inside_the_roots_is_followed(place, tmp_path):
    save(tmp_path / "shared" / "base")
    (place.store.root / "models").mkdir()
    os.symlink(tmp_path / "shared" / "base", place.store.root / "models" / "link")
    assert (await place.resolve("link")).directory == tmp_path / "shared" / "base"


async def test_unknown_name_says_what_there_is(place):
    save(place.store.root / "models" / "mine")
    await publish(place, "ft:b::a", "jobs/a/1")
    with pytest.raises(ModelNotFound, match=r"There are: ft:b::a, mine\.") as refused:
        await place.resolve("nowhere")
    assert str(place.store.root / "models") in refused.value.message


async def test_hub_id_where_the_hub_is_off_or_away(place, monkeypatch):
    with pytest.raises(ModelNotFound, match="DPO_HUB"):
        await place.resolve("org/name")
    on = Place(place.store.root, hub=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        await on.resolve("org/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ModelNotFound, match="cannot be reached"):
        await on.resolve("org/name")
    await on.database.close()


async def test_hub_model_is_described_without_weights(place, monkeypatch, tmp_path):
    (save(tmp_path / "snapshot") / "model.safetensors").unlink()

    async def fetch(name):
        return tmp_path / "snapshot"

    monkeypatch.setattr(hub, "fetch_description", fetch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    on = Place(place.store.root, hub=True)
    facts = await on.resolve("org/name")
    assert facts.source.hub == "org/name"
    assert facts.weight_bytes == 0
    await on.database.close()


async def test_delete_of_an_unknown_model(place):
    async with place.database.begin() as session:
        with pytest.raises(NotFound):
            await models.delete(session, "ft:none")


@pytest.mark.parametrize(
    ("config", "mend"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "sequence-to-sequence"),
        ({"architectures": ["BertModel"]}, "ForCausalLM"),
        ({"architectures": []}, "no architecture"),
    ],
)
def test_models_of_other_kinds_are_refused(tmp_path, config, mend):
    with pytest.raises(ModelNotFound, match=mend):
        inspect(save(tmp_path / "m", **config), "m")


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "max_position_embeddings": None, "n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 77, "vocab_size": 5}}, 77),
        ({"max_position_embeddings": None}, NO_LENGTH),
    ],
)
def test_length_under_its_several_names(tmp_path, config, length):
    assert inspect(save(tmp_path / "m", **config), "m").max_length == length


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"hidden_size": 64, "num_hidden_layers": 3}, 192),
        ({"n_embd": 8, "n_layer": 2}, 16),
        ({"text_config": {"hidden_size": 5, "num_hidden_layers": 2}}, 10),
        ({"hidden_size": 64}, 0),
    ],
)
def test_layer_width_under_its_several_names(tmp_path, config, width):
    assert inspect(save(tmp_path / "m", **config), "m").layer_width == width


@pytest.mark.parametrize("content", ["[]", "{", "\xff"])
def test_config_that_is_none(tmp_path, content):
    directory = save(tmp_path / "m")
    (directory / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        inspect(directory, "m")


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_chat_template_in_a_file_of_its_own(tmp_path, name):
    directory = save(tmp_path / "m")
    assert not inspect(directory, "m").has_chat_template
    (directory / name).write_text("{{ x }}")
    assert inspect(directory, "m").has_chat_template


@pytest.mark.parametrize(
    ("config", "coefficient"),
    [
        ({"model_type": "llama", "router_aux_loss_coef": 0.5}, None),
        ({"model_type": "mixtral", "router_aux_loss_coef": 0.02}, 0.02),
        ({"model_type": "mixtral", "router_aux_loss_coef": 0}, 0.0),
        ({"model_type": "qwen3_moe"}, 0.001),
        ({"text_config": {"model_type": "olmoe", "router_aux_loss_coef": 0.01}}, 0.01),
    ],
)
def test_the_router_loss_of_a_mixture(tmp_path, config, coefficient):
    assert inspect(save(tmp_path / "m", **config), "m").router_coef == coefficient
