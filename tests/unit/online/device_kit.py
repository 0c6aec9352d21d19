"""Samplers on GPUs without a GPU: vLLM's own senders with a queue for NCCL, our own sampler around an engine of
transformers, and actors that die when they are told.

    DeviceSender ── vLLM's send_weights ── Wire ──> Engine (a transformers model) <── VllmSampler <── Actor <── pool

What is not here is what a GPU does: NCCL, CUDA IPC, vLLM's loading of the tensors, and its sleep.
"""

from __future__ import annotations

import asyncio
import queue
from types import SimpleNamespace

import torch

from dpo_service.errors import SamplerLost
from dpo_service.online.fake_sampler import FakeSampler
from dpo_service.online.pool import Member, SamplerPool
from dpo_service.online.vllm_sampler import VllmSampler
from dpo_service.online.weights import model_shapes
from dpo_service.specs.sampling import SamplerSpec

BOTH = {"weights", "kv_cache"}
WAIT_S = 20


class Wires:
    """In NCCL's place: a queue for each receiver of a group, by the group's port."""

    def __init__(self):
        self.groups = {}
        self.opened = 0

    def address(self):
        self.opened += 1
        return "trainer", self.opened

    def open(self, info):
        """The sender's end, as vLLM opens it."""
        group = self.groups[info.master_port] = [queue.Queue() for _ in range(info.world_size - 1)]
        return SimpleNamespace(put=lambda tensor: [q.put(tensor.clone()) for q in group], destroy=lambda: None)

    def receiver(self, info):
        return self.groups[info["master_port"]][info["rank_offset"] - 1]


def use_wires(monkeypatch):
    """vLLM's trainer side from here on sends by wire; everything but the device's own work is vLLM's."""
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    class Nccl(nccl_engine.NCCLTrainerWeightTransferEngine):
        def _broadcast(self, source, meta):
            for _, tensor in self._checked_iter(source, meta):
                self.model_update_group.put(tensor)

    class Ipc(ipc_engine.IPCTrainerWeightTransferEngine):
        def __init__(self, *, client, source, is_sender, packed, packed_buffer_size_bytes):
            self.client, self.source, self.is_sender = client, source, is_sender

        def _send(self, source):
            for name, tensor in source:
                self.client.update_weights({"names": [name], "handles": [tensor]})

        @staticmethod
        def _post_send_sync(): ...

    wires = Wires()
    monkeypatch.setattr(WeightTransferTrainerFactory, "_registry", {"nccl": lambda: Nccl, "ipc": lambda: Ipc})
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", wires.open)
    return wires


class Engine:
    """What VllmSampler needs of AsyncLLM. Asked what would crash or tear vLLM's, it fails the test."""

    def __init__(self, model_dir, wires):
        self._fake = FakeSampler(SamplerSpec(), model_dir, 0)
        self._shapes = model_shapes(model_dir)
        self._wires, self._wire = wires, None
        self.asleep, self.log, self.inside, self.updating, self.fails = set(), [], 0, False, None

    def note(self, event):
        self.log.append(event)

    async def generate(self, tokens, parameters, name, lora_request):
        assert not self.asleep, "asked in its sleep"
        assert not self.updating, "asked between two policies"
        self.inside += 1
        if self.log[-1:] != ["generate"]:
            self.note("generate")
        answers = []
        for place in range(parameters.n):
            await asyncio.sleep(0)
            ids = list(tokens["prompt_token_ids"])
            answers.append(_output(self._fake._answer(ids, parameters.seed + place, parameters)))
        self.inside -= 1
        yield SimpleNamespace(outputs=answers)

    async def init_weight_transfer_engine(self, request):
        if "master_port" in request.init_info:
            # The sender opens its end at the same time, on another thread.
            self._wire = await asyncio.to_thread(self._meet, request.init_info)

    def _meet(self, info):
        while info["master_port"] not in self._wires.groups:
            pass
        return self._wires.receiver(info)

    async def start_weight_update(self):
        assert "weights" not in self.asleep, "vLLM's engine dies of an update of sleeping weights"
        assert self.inside == 0, "an answer would mix two policies"
        self.updating, self._got = True, {}
        self.note("start")

    async def update_weights(self, request):
        info = request.update_info
        if self.fails:
            raise self.fails
        if "handles" in info:
            self._got |= dict(zip(info["names"], info["handles"], strict=True))
            return
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            tensor = await asyncio.to_thread(self._wire.get, timeout=WAIT_S)
            assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{dtype}", shape)
            self._got[name] = tensor

    async def finish_weight_update(self, version):
        assert {name: tuple(tensor.shape) for name, tensor in self._got.items()} == self._shapes
        self._fake._model.load_state_dict({name: t.float() for name, t in self._got.items()}, strict=False)
        self.updating = False
        self.note(f"finish {version}")

    async def reset_prefix_cache(self): ...

    async def sleep(self, level):
        assert (level, self.inside, self.asleep) == (1, 0, set())
        self.asleep = set(BOTH)
        self.note("sleep")

    async def wake_up(self, tags):
        assert set(tags) <= self.asleep
        self.asleep -= set(tags)
        self.note(f"wake {' '.join(sorted(tags))}")

    def shutdown(self): ...


def _output(sample):
    logps = SimpleNamespace(logprobs=list(sample.logps), start_indices=range(len(sample.logps)))
    reason = "stop" if sample.finished else "length"
    return SimpleNamespace(token_ids=sample.token_ids, finish_reason=reason, logprobs=logps)


class Actor:
    """A sampler's process, as the pool and the trainer reach it."""

    def __init__(self, spec, model_dir, wires):
        self._make = lambda: VllmSampler(Engine(model_dir, wires), spec, model_dir, 0)
        self.lives, self.dies_in = 0, None
        self.may_return = asyncio.Event()
        self.may_return.set()
        self._born()

    def _born(self):
        self.dead, self.group_name = False, ""
        self.sampler, self.lives = self._make(), self.lives + 1

    @property
    def engine(self):
        return self.sampler._engine

    def kill(self):
        self.dead = True

    async def revive(self):
        await self.may_return.wait()
        if self.dead:
            self._born()

    async def call(self, method, *arguments):
        if self.dies_in == method:
            self.dies_in = None
            self.kill()
        if self.dead and method != "version":
            raise SamplerLost("killed")
        await self.revive()
        if method == "group":
            return self.group_name
        if method == "join_group":
            await self.sampler.init_weight_transfer_engine(arguments[0])
            self.group_name = arguments[1]
            return None
        return await getattr(self.sampler, method)(*arguments)

    async def sample(self, prompts, options):
        return await self.call("sample", prompts, options)

    async def sync(self, weights):
        return await self.call("sync", weights)

    async def version(self):
        return await self.call("version")

    async def sleep(self):
        await self.call("sleep")

    async def wake(self):
        await self.call("wake")

    async def close(self):
        self.kill()


class Reached:
    """`device_transfer.ask_actors` of actors in an event loop: where the curator's is, on its thread."""

    def __init__(self):
        self.loop = None

    def __call__(self, calls):
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(self._all(calls), self.loop).result(WAIT_S)

    async def _all(self, calls):
        answers = await asyncio.gather(*(c.sampler.call(c.method, *c.arguments) for c in calls), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, SamplerLost):
                raise answer
        return answers


def pool_of(actors, *, chunk=2):
    return SamplerPool([Member(actor, 0, actor.revive) for actor in actors], chunk=chunk)


def float_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if torch.is_floating_point(tensor)}
