"""The table of families says what the code does."""

import json

import pytest

from benchmarks.families import NAMES, RESULTS, measure
from benchmarks.report import MODELS_PAGE, render_families

FOUND = json.loads(RESULTS.read_text())
TRIED = ("llama", "gpt2", "bloom", "gemma3n_text", "mamba2", "mixtral", "gpt_oss", "gemma3", "qwen3_vl", "paligemma")


def test_the_page_holds_the_table_as_it_was_computed():
    page = MODELS_PAGE.read_text()
    assert render_families(page, FOUND) == page, "run python -m benchmarks.report"


def test_every_family_of_the_tests_is_in_the_table():
    assert sorted(FOUND["families"]) == NAMES, "run python -m benchmarks.families"
    page = MODELS_PAGE.read_text()
    assert all(f"| {name} | " in page for name in NAMES)


@pytest.mark.parametrize("name", TRIED)
def test_a_cell_is_what_the_code_gives(name, tmp_path):
    found = dict(FOUND["families"][name])
    del found["vllm"]
    assert measure(name, tmp_path) == found, f"run python -m benchmarks.families --only {name}"


def test_every_family_that_trains_is_planned():
    assert [name for name, entry in FOUND["families"].items() if entry["trains"] and not entry["planned"]] == []
