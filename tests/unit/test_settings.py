import pytest
from pydantic import ValidationError

from dpo_service.main import environment
from dpo_service.settings import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org"])
def test_other_addresses_need_a_key(host, monkeypatch):
    monkeypatch.delenv("DPO_API_KEYS", raising=False)
    with pytest.raises(ValidationError, match="DPO_API_KEYS"):
        Settings(host=host)
    assert not Settings(host=host, api_keys=("sk-1",)).on_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_none(host):
    assert Settings(host=host).on_loopback


def test_an_existing_cluster_needs_its_address():
    with pytest.raises(ValidationError, match="DPO_RAY_ADDRESS"):
        Settings(cluster="ray_jobs")
    assert Settings(cluster="ray_jobs", ray_address="http://head:8265").ray_address


def test_settings_survive_the_way_through_the_environment(tmp_path, monkeypatch):
    before = Settings(data_dir=tmp_path, port=1234, api_keys=("sk-1",), allowed_model_roots=(tmp_path,), hub=False)
    for name, value in environment(before).items():
        monkeypatch.setenv(name, value)
    assert Settings() == before
