"""What the loop keeps of its samples is what is shown of them."""

from __future__ import annotations

from dpo_service.api.schemas.samples import SampleList
from dpo_service.jobs import samples
from dpo_service.online.judges.port import PairVerdict, Verdict
from dpo_service.online.port import Sample
from dpo_service.online.prompts import PromptRow
from dpo_service.online.samples import SampleFiles
from dpo_service.online.steps import Turn
from dpo_service.storage.store import Store

PROMPT = PromptRow(index=7, token_ids=(1, 2), text=({"role": "user", "content": "How?"},), reference=None, row={})
SAMPLES = (Sample((3, 4), (-0.5, -0.25), True, 2), Sample((5,), (-1.0,), False, 2))


def turn(position, verdict, places=(), dropped=None):
    return Turn(position, PROMPT, SAMPLES, ("so", "no"), verdict, places, (), dropped)


async def test_what_is_written_is_read_back(tmp_path):
    store = Store(tmp_path)
    said = Verdict("pairwise", (1.0, None), (None, "timeout"), (PairVerdict(0, 1, ("first", None), "timeout"),), ("A",))
    written = SampleFiles(store, "ftjob-1")
    await written.write(4, (turn(9, said, ((0, 1), (-1, 1))), turn(10, None, dropped="stale")))
    first, second = SampleList.of(samples.read(store, "ftjob-1", step=5, after=None, limit=5)).data
    assert (first.id, first.step, first.prompt_index, first.judge) == ("5-9", 5, 7, "pairwise")
    assert first.prompt == [{"role": "user", "content": "How?"}]
    one, other = first.answers
    assert (one.text, one.finished, one.logp, one.version, one.score) == ("so", True, -0.75, 2, 1.0)
    assert (other.text, other.finished, other.score, other.missing) == ("no", False, None, "timeout")
    (compared,) = first.comparisons
    assert (compared.first_shown_first, compared.second_shown_first, compared.missing) == ("first", None, "timeout")
    assert [(pair.chosen, pair.rejected) for pair in first.pairs] == [(0, 1), (-1, 1)]
    assert (second.judge, second.dropped, second.pairs, second.answers[0].score) == (None, "stale", [], None)
