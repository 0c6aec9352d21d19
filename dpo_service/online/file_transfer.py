"""vLLM's weight transfer by a mapped file: the backend for CPUs, where vLLM has none of its own.

Importing this module registers it under `BACKEND`; vLLM imports it in the engine's process by `EXTENSION`.

Source: vllm.distributed.weight_transfer.nccl_engine, of which this is the same with another way in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from dpo_service.online.engine import FILE_BACKEND


@dataclass
class FileInit(WeightTransferInitInfo):  # type: ignore[misc]
    """There is nothing to agree on."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    path: str
    """A safetensors file that `weights.check` has accepted."""


class FileEngine(WeightTransferEngine):  # type: ignore[misc]
    init_info_cls, update_info_cls = FileInit, FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdate) -> None:
        # Mapped, not read: the only copy is the one into the model.
        self.model.load_weights(load_file(update_info.path).items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_heads(self.model)

    def shutdown(self) -> None:
        pass


def repack_tied_heads(model: Any) -> None:
    """Have output heads that share the embedding's weight use the new one: on CPUs vLLM multiplies by a packed copy,
    which it makes anew for the layers that are loaded, and a tied head is not."""
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


class Registered:
    """What vLLM mixes into its worker; it asks for this class by name and thereby imports the module."""


def register(factory: Any = WeightTransferEngineFactory) -> None:
    if FILE_BACKEND not in factory._registry:
        factory.register_engine(FILE_BACKEND, FileEngine)


register()
