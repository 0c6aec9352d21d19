from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.train.composites import save_composite
from tests.unit.train.families import PACKED, family
from tests.unit.train.training_kit import VOCAB, build_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def mixture_dir(tmp_path_factory) -> Path:
    """The same with four experts a layer, two of them for each token."""
    directory = build_model(tmp_path_factory.mktemp("mixture"))
    family("mixtral", PACKED["mixtral"] | {"vocab_size": VOCAB}).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def composite_dir(tmp_path_factory) -> Path:
    """One that reads images beside text."""
    return save_composite("gemma3", tmp_path_factory.mktemp("composite"))


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(1)
