import pytest
from pydantic import ValidationError

from dpo_service.specs.pairing import PairingSpec


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"choose": "worst"}, "best_worst"),
        ({"margin": -1}, "margin"),
        ({"length": {}}, "changes nothing"),
        ({"length": {"tolerance": 1}, "choose": "all_pairs"}, "is for best_worst"),
        ({"cut_off": "chosen"}, "rejected_only"),
    ],
)
def test_what_cannot_work_is_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        PairingSpec.model_validate(fields)
