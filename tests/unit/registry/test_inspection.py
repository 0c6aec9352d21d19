"""What the control plane remembers of the inspections it asked for."""

from __future__ import annotations

from dpo_service.manifests.inspection import Inspection, InspectionRequest, SampleRow
from dpo_service.registry import inspection
from dpo_service.registry.inspection import inspect_model

ROW = SampleRow(line=1, texts=("p", "pc"), conversations=(({"role": "user", "content": "hi", "n": [1, None]},),))


def test_other_rows_are_another_question(tmp_path, monkeypatch):
    asked = []

    def answer(request):
        asked.append(InspectionRequest.model_validate_json(request.model_dump_json()))
        return Inspection()

    monkeypatch.setattr(inspection, "_ask", answer)
    monkeypatch.setattr(inspection, "_kept", {})
    alone = InspectionRequest(directory=str(tmp_path))
    with_rows = InspectionRequest(directory=str(tmp_path), samples=(ROW,))
    for request in (alone, with_rows, alone, with_rows):
        assert inspect_model(request) == Inspection()
    assert asked == [alone, with_rows]
    (tmp_path / "tokenizer.json").write_text("{}")
    inspect_model(with_rows)
    assert asked == [alone, with_rows, with_rows]
