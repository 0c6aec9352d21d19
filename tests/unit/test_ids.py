import re

from hypothesis import given
from hypothesis import strategies as st

from dpo_service import ids


def test_submission_id_is_a_function_of_job_and_attempt():
    job = ids.new_job_id()
    assert ids.submission_id(job, 1) == ids.submission_id(job, 1) != ids.submission_id(job, 2)
    assert len(ids.submission_id(job, 99)) <= 47
    assert "/" not in ids.submission_id(job, 1)


@given(st.text(max_size=80))
def test_slug_is_always_a_name(text):
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", ids.slug(text))


def test_fine_tuned_model_names_its_base_suffix_and_job():
    assert ids.fine_tuned_model_id("org/Tiny", "My run", "ftjob-abc") == "ft:tiny:my-run:abc"
    first = ids.fine_tuned_model_id("tiny", None, "ftjob-abc")
    assert ids.fine_tuned_model_id(first, None, "ftjob-def") == "ft:tiny::def"
