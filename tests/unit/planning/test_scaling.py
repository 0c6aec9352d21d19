"""The page of scaling says what the model computes."""

from pathlib import Path

from dpo_service.planning.scaling import render

PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"


def test_the_tables_are_those_of_the_model():
    page = PAGE.read_text()
    assert render(page) == page, "run python -m dpo_service.planning.scaling docs/scaling.md"
