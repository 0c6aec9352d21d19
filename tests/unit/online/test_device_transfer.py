"""Weights from device to device, as far as a CPU goes: what is agreed with whom, and what is refused before it is sent.
The transfers themselves are vLLM's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dpo_service.errors import WeightsRefused
from dpo_service.online.device_transfer import DeviceSender, SamplersClient, init_info
from dpo_service.online.vllm_sampler import VllmSampler
from dpo_service.online.weights import model_shapes
from dpo_service.specs.sampling import SamplerSpec
from dpo_service.train.policy import load_model
from tests.models import save_tiny_llama

TWO_OF_TWO = SamplerSpec(samplers=2, gpus=2)


class Handle:
    """Of an actor: notes what it is asked."""

    def __init__(self, refuses: bool = False):
        self.asked, self.refuses = [], refuses

    def __getattr__(self, method):
        def remote(*arguments):
            self.asked.append((method, *arguments))
            if method == "check_tensors" and self.refuses:
                raise WeightsRefused("other tensors")

        return SimpleNamespace(remote=remote)


@pytest.fixture
def client(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "get", lambda references: references)
    made = SamplersClient([SimpleNamespace(handle=Handle()), SimpleNamespace(handle=Handle())])
    return made


def asked(client):
    return [handle.asked for handle in client._handles]


def test_each_samplers_ranks_follow_the_others(client):
    pytest.importorskip("vllm")
    info = init_info(TWO_OF_TWO, 0, "10.0.0.1", 29500)
    assert (info.backend, info.world_size, info.is_sender) == ("nccl", 5, True)
    client.init_weight_transfer_engine({"master_address": "10.0.0.1", "rank_offset": 1, "world_size": 5})
    assert [call[0][1]["rank_offset"] for call in asked(client)] == [1, 3]


def test_on_a_shared_device_nobody_needs_an_address(client):
    pytest.importorskip("vllm")
    info = init_info(SamplerSpec(gpus=1, shares_device=True), 1, "", 0)
    assert (info.backend, info.is_sender) == ("ipc", False)
    client.init_weight_transfer_engine({"packed": True})
    assert asked(client) == [[("init_weight_transfer_engine", {"packed": True})]] * 2


def test_sending_checks_first_and_sets_the_version_last(client, tmp_path):
    pytest.importorskip("vllm")
    model = load_model(save_tiny_llama(tmp_path))
    sender = DeviceSender(model, TWO_OF_TWO, client, rank=0)

    def send_weights():  # the order of vllm's NCCLTrainerWeightTransferEngine.send_weights
        client.start_weight_update()
        client.update_weights({"names": []})
        client.finish_weight_update()

    sender._engine = SimpleNamespace(send_weights=send_weights)
    sender.send(9)
    for calls in asked(client):
        assert calls[0] == ("check_tensors", model_shapes(tmp_path))
        assert [call[0] for call in calls[1:]] == ["start_weight_update", "update_weights", "finish_weight_update"]
        assert calls[-1][1] == 9


def test_another_models_weights_are_not_sent(client, tmp_path):
    pytest.importorskip("vllm")
    client._handles[1].refuses = True
    sender = DeviceSender(load_model(save_tiny_llama(tmp_path)), TWO_OF_TWO, client, rank=0)
    with pytest.raises(WeightsRefused):
        sender.send(1)
    assert ("start_weight_update",) not in client._handles[0].asked


async def test_a_sampler_refuses_tensors_that_are_not_its_models(tmp_path):
    sampler = VllmSampler(None, TWO_OF_TWO, save_tiny_llama(tmp_path), 0)
    shapes = model_shapes(tmp_path)
    await sampler.check_tensors(shapes)
    with pytest.raises(WeightsRefused, match=r"model.norm.weight is \[3\]"):
        await sampler.check_tensors(shapes | {"model.norm.weight": [3]})
    with pytest.raises(WeightsRefused, match="is missing"):
        await sampler.check_tensors({})


def test_the_cpu_has_no_devices_to_send_between():
    with pytest.raises(ValueError, match="publish them as a file"):
        DeviceSender(None, SamplerSpec(), None, rank=0)
