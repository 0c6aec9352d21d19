from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.train.training_kit import build_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(1)
