"""A job hears where its model's frequencies differ between training and serving."""

from __future__ import annotations

import pytest

from dpo_service.inspection.inspect import inspect
from dpo_service.manifests.inspection import InspectionRequest
from tests.unit.train.families import PACKED, family
from tests.unit.train.test_neighbours import BY_LENGTH, ORIGINAL, STEADY


def notes(directory, name, added):
    family(name, added).save_pretrained(directory)
    report = inspect(InspectionRequest(directory=str(directory)))
    assert report.faults == ()
    return report.notes


@pytest.mark.parametrize("name", ["phi3/longrope", "phimoe/longrope", "llama/dynamic", "gemma3_text/dynamic"])
def test_frequencies_that_depend_on_length_are_noted(tmp_path, name):
    (note,) = notes(tmp_path, name, BY_LENGTH[name])
    assert f"over {ORIGINAL} tokens" in note
    assert ("the long frequencies for every sequence" in note) == ("longrope" in name)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", *STEADY])
def test_others_are_not(tmp_path, name):
    assert notes(tmp_path, name, (PACKED | STEADY)[name]) == ()
