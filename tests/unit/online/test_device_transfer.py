"""Weights from device to device, as far as a CPU goes: what is sent, what is agreed with whom, and that the installed
vLLM has what is called. The transfers themselves are vLLM's; `test_device_loop.py` has them in the loop."""

from __future__ import annotations

import inspect
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dpo_service.errors import SamplerLost, WeightsRefused
from dpo_service.online.device_transfer import (
    Call,
    DeviceSender,
    PolicySource,
    SamplersClient,
    TransferBroken,
    init_info,
)
from dpo_service.online.vllm_sampler import CACHE, WEIGHTS, VllmSampler
from dpo_service.online.weights import WeightsFolder, model_shapes
from dpo_service.specs.sampling import SamplerSpec
from dpo_service.train.policy import load_model, merged_state
from tests.models import save_tiny_llama

TWO_OF_TWO = SamplerSpec(samplers=2, gpus=2)


class Asked:
    """An `Ask` that notes the calls; `away` are samplers that are not there, `groups` say who is in which."""

    def __init__(self):
        self.calls, self.away, self.groups, self.refuses = [], set(), {}, None

    def __call__(self, calls):
        self.calls += calls
        return [self.answer(call) for call in calls]

    def answer(self, call: Call):
        if call.sampler in self.away and call.method != "version":
            return SamplerLost("away")
        if call.method == "version":
            self.away.discard(call.sampler)
        if call.method == "join_group":
            self.groups[call.sampler] = call.arguments[1]
        if call.method == self.refuses:
            raise WeightsRefused("other tensors")
        return self.groups.get(call.sampler, "") if call.method == "group" else None

    def of(self, method):
        return [call for call in self.calls if call.method == method]


@pytest.fixture
def asked():
    return Asked()


@pytest.fixture
def client(asked):
    return SamplersClient(["one", "two"], asked)


# What is sent


def test_a_source_gives_what_a_file_has(tmp_path):
    model = load_model(save_tiny_llama(tmp_path))
    same_as_the_file(model, tmp_path)
    assert "lm_head.weight" not in PolicySource(model, "float32").shapes(), "it is the embedding"


def test_a_source_gives_experts_one_by_one_as_a_file_has_them(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=11,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    same_as_the_file(model, tmp_path)
    assert "model.layers.10.mlp.experts.3.down_proj.weight" in PolicySource(model, "float32").shapes()


def same_as_the_file(model, directory):
    folder = WeightsFolder(1, directory / "published", shared=directory / "published")
    file = load_file(folder.publish(model, merged_state(model), 1, "bfloat16").path)
    source = PolicySource(model, "bfloat16")
    sent = list(source)
    assert [(name, t.dtype, tuple(t.shape)) for name, t in sent] == [tuple(one) for one in source.metadata()]
    assert {name for name, _ in sent} == file.keys() == model_shapes(directory).keys()
    for name, tensor in sent:
        assert torch.equal(tensor, file[name])


def test_a_source_gives_others_instead(tmp_path):
    source = PolicySource(load_model(save_tiny_llama(tmp_path)), "float32")
    instead = torch.full_like(dict(source)["model.norm.weight"], 7.0)
    source.instead = {"model.norm.weight": instead}
    assert torch.equal(dict(source)["model.norm.weight"], instead)
    assert not torch.equal(dict(source)["model.embed_tokens.weight"], instead)


def test_the_largest_tensor_fits_into_a_buffer(tmp_path):
    source = PolicySource(load_model(save_tiny_llama(tmp_path)), "bfloat16")
    assert source.buffer_bytes() == 1 << 30
    source._metadata = [source.metadata()[0]._replace(shape=(200_000, 8192))]
    assert source.buffer_bytes() == 200_000 * 8192 * 2


# With whom


def test_each_samplers_ranks_follow_the_others(asked, client):
    pytest.importorskip("vllm")
    assert client.meet()
    info = init_info(TWO_OF_TWO, 0, ("10.0.0.1", 29500), client.members, 1 << 30)
    assert (info.backend, info.world_size, info.is_sender) == ("nccl", 5, True)
    client.init_weight_transfer_engine({"master_address": "10.0.0.1", "rank_offset": 1, "world_size": 5})
    assert [call.arguments[0]["rank_offset"] for call in asked.of("join_group")] == [1, 3]


def test_on_a_shared_device_nobody_needs_an_address(asked, client):
    pytest.importorskip("vllm")
    info = init_info(SamplerSpec(gpus=1, shares_device=True), 1, ("", 0), 0, 5)
    assert (info.backend, info.is_sender, info.packed_buffer_size_bytes) == ("ipc", False, 5)
    client.meet()
    client.init_weight_transfer_engine({"packed": True})
    assert [call.arguments[0] for call in asked.of("join_group")] == [{"packed": True}] * 2


def test_a_group_lasts_until_somebody_comes_or_goes(asked, client):
    client.meet()
    client.init_weight_transfer_engine({})
    assert not client.meet()
    asked.away = {"two"}
    assert (client.meet(), client.members) == (True, 1)
    client.init_weight_transfer_engine({})
    assert not client.meet()
    asked.away, asked.groups["two"] = set(), ""  # restarted
    assert (client.meet(), client.members) == (True, 2)


def test_where_nobody_is_there_the_first_who_comes_back_is_waited_for(asked, client):
    asked.away = {"one", "two"}
    assert client.meet()
    assert client.members == 2
    assert len(asked.of("version")) == 2


def test_the_version_is_set_last_and_who_is_lost_breaks_the_transfer(asked, client):
    client.meet()
    client.version, broke = 9, []
    client.broke = lambda: broke.append(True)
    client.start_weight_update()
    client.update_weights({"names": []})
    client.finish_weight_update()
    assert [call.arguments for call in asked.of("finish_weight_update")] == [(9,), (9,)]
    assert not broke
    asked.away = {"two"}
    with pytest.raises(TransferBroken, match="away"):
        client.update_weights({"names": []})
    assert broke, "a broadcast would wait for it for ever"


def test_a_broadcast_that_has_lost_a_receiver_is_let_go(tmp_path, asked, client, monkeypatch):
    pytest.importorskip("vllm")
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    let_go = []
    engine = SimpleNamespace(model_update_group=SimpleNamespace(destroy=lambda: let_go.append(True)))
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", lambda **_: engine)
    sender = sender_of(tmp_path, client)
    sender.check()
    asked.away = {"two"}
    with pytest.raises(TransferBroken):
        client.update_weights({})
    assert let_go


def sender_of(directory, client, spec=TWO_OF_TWO):
    model = load_model(save_tiny_llama(directory))
    return DeviceSender(model, spec, rank=0, client=client, address=lambda: ("here", 1))


def test_another_models_weights_are_not_sent(tmp_path, asked, client):
    asked.refuses = "check_tensors"
    with pytest.raises(WeightsRefused):
        sender_of(tmp_path, client).check()
    assert {call.method for call in asked.calls} == {"group", "check_tensors"}


async def test_a_sampler_refuses_tensors_that_are_not_its_models(tmp_path):
    sampler = VllmSampler(None, TWO_OF_TWO, save_tiny_llama(tmp_path), 0)
    shapes = model_shapes(tmp_path)
    await sampler.check_tensors(shapes)
    with pytest.raises(WeightsRefused, match=r"model.norm.weight is \[3\]"):
        await sampler.check_tensors(shapes | {"model.norm.weight": [3]})
    with pytest.raises(WeightsRefused, match="is missing"):
        await sampler.check_tensors({})


def test_the_cpu_has_no_devices_to_send_between(tmp_path, client):
    with pytest.raises(ValueError, match="publish them as a file"):
        sender_of(tmp_path, client, SamplerSpec())


# The vLLM that is installed


def takes(function, *arguments, **named):
    """Whether `function`, a method, can be called so."""
    inspect.signature(function).bind(None, *arguments, **named)


def test_the_installed_engine_has_what_a_sampler_calls():
    pytest.importorskip("vllm")
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.abstract import Executor

    takes(AsyncLLM.init_weight_transfer_engine, WeightTransferInitRequest(init_info={}))
    takes(AsyncLLM.start_weight_update)
    takes(AsyncLLM.update_weights, WeightTransferUpdateRequest(update_info={}))
    takes(AsyncLLM.finish_weight_update, "1")
    takes(AsyncLLM.update_weight_version, "1")
    takes(AsyncLLM.reset_prefix_cache)
    takes(AsyncLLM.sleep, level=1)
    takes(AsyncLLM.wake_up, [WEIGHTS, CACHE])
    asleep = inspect.getsource(Executor.sleep)
    assert f'"{WEIGHTS}", "{CACHE}"' in asleep, "what sleeps has other names"


def test_the_installed_senders_call_what_the_client_and_the_source_have():
    pytest.importorskip("vllm")
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.weight_transfer.base import ParamMeta, VLLMWeightSyncClient, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    for name, method in inspect.getmembers(VLLMWeightSyncClient, inspect.isfunction):
        if not name.startswith("_"):
            asked = list(inspect.signature(method).parameters)
            assert list(inspect.signature(getattr(SamplersClient, name)).parameters) == asked
    assert WeightSource.__abstractmethods__ == {"metadata", "__iter__"}
    assert all(hasattr(PolicySource, name) for name in WeightSource.__abstractmethods__)
    assert [field.name for field in fields(ParamMeta)] == ["name", "dtype", "shape"]
    takes(WeightTransferTrainerFactory.trainer_init.__func__, init_info=None, client=None, source=None)
    assert {"rank", "packed", "packed_buffer_size_bytes"} <= {field.name for field in fields(IPCTrainerInitInfo)}
    assert {"rank", "master_address", "master_port", "world_size", "packed_buffer_size_bytes"} <= {
        field.name for field in fields(NCCLTrainerInitInfo)
    }
    takes(PyNcclCommunicator.destroy)
