"""Random users, clusters, crashes and clocks against the repository and the reconciler; what must hold always holds."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from dpo_service import ids
from dpo_service.errors import Conflict
from dpo_service.jobs.cancel import cancel
from dpo_service.jobs.context import Point
from dpo_service.jobs.pause import pause, resume
from dpo_service.jobs.states import ON_CLUSTER, STOPPING, TABLE, TERMINAL, State
from tests.faults.test_crashes import Crash, dies_at
from tests.unit.jobs.world import World, metrics_report, open_world

T = TypeVar("T")
LIMIT = 2


class Jobs(RuleBasedStateMachine):
    jobs = Bundle("jobs")

    @initialize()
    def open(self) -> None:
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp(prefix="jobs-"))
        self.opened = open_world(self.directory, max_running_jobs=LIMIT)
        self.world: World = self.do(self.opened.__aenter__())
        self.ended: dict[str, State] = {}
        self.cancelled: set[str] = set()
        self.pauses: Counter[str] = Counter()
        self.reported: dict[str, set[int]] = {}

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(what)

    def teardown(self) -> None:
        try:
            self.everything_ends()
        finally:
            self.do(self.opened.__aexit__(None, None, None))
            self.runner.close()
            shutil.rmtree(self.directory, ignore_errors=True)

    @rule(target=jobs)
    def submit(self) -> str:
        job_id = self.do(self.world.submit())
        self.reported[job_id] = set()
        return job_id

    @rule(job_id=jobs)
    def cancel(self, job_id: str) -> None:
        before = self.do(self.world.state(job_id))
        try:
            self.do(cancel(self.world.database, job_id, clock=self.world.clock))
            assert before not in TERMINAL
            self.cancelled.add(job_id)
        except Conflict:
            assert before in TERMINAL

    @rule(job_id=jobs)
    def pause(self, job_id: str) -> None:
        before = self.do(self.world.state(job_id))
        try:
            after = self.do(pause(self.world.database, job_id, clock=self.world.clock)).job_state
            assert after in (State.PAUSING, State.PAUSED)
            self.pauses[job_id] += after is not before
        except Conflict:
            assert before in TERMINAL | {State.CANCELLING}

    @rule(job_id=jobs)
    def resume(self, job_id: str) -> None:
        before = self.do(self.world.state(job_id))
        try:
            after = self.do(resume(self.world.database, job_id, clock=self.world.clock)).job_state
            assert after is (State.QUEUED if before is State.PAUSED else before)
        except Conflict:
            assert before in TERMINAL | STOPPING

    @rule()
    def tick(self) -> None:
        self.do(self.world.tick())

    @rule(point=st.sampled_from(Point), visit=st.integers(1, 3))
    def tick_and_die(self, point: Point, visit: int) -> None:
        try:
            self.do(self.world.reconciler(reached=dies_at(point, visit)).tick())
        except Crash:
            self.do(self.world.expire_leases())

    @rule(seconds=st.sampled_from([1.0, 61.0, 1000.0]))
    def wait(self, seconds: float) -> None:
        self.world.clock.advance(seconds)

    @rule(blind=st.booleans())
    def look_away(self, blind: bool) -> None:
        self.world.cluster.unreachable = blind

    @rule(job_id=jobs)
    def start(self, job_id: str) -> None:
        if submission_id := self.alive(job_id):
            self.world.cluster.start_running(submission_id)

    @rule(job_id=jobs, how=st.sampled_from(["succeed", "fail", "die", "fail for good", "obey"]))
    def end(self, job_id: str, how: str) -> None:
        if self.alive(job_id):
            self.finish(job_id, how)

    @rule(job_id=jobs, steps=st.sets(st.integers(0, 5), min_size=1), by_http=st.booleans())
    def report(self, job_id: str, steps: set[int], by_http: bool) -> None:
        """The spool always; HTTP perhaps."""
        if not self.alive(job_id):
            return
        self.reported[job_id] |= steps
        attempt = self.attempt(job_id)
        self.world.spool(job_id, [metrics_report(step) for step in self.reported[job_id]], attempt)
        if by_http:
            self.do(self.world.ingest(job_id, [metrics_report(step) for step in steps], attempt))

    def attempt(self, job_id: str) -> int:
        return self.do(self.world.job(job_id)).attempt

    def alive(self, job_id: str) -> str | None:
        submission_id = ids.submission_id(job_id, self.attempt(job_id))
        return submission_id if self.world.cluster._alive(submission_id) else None

    def finish(self, job_id: str, how: str) -> None:
        attempt = self.attempt(job_id)
        if how == "obey":
            self.world.stop(job_id, attempt)
        elif how == "fail for good":
            self.world.fail(job_id, attempt, retryable=False)
        else:
            {"succeed": self.world.succeed, "fail": self.world.fail, "die": self.world.die}[how](job_id, attempt)

    def everything_ends(self) -> None:
        """Left alone with a cluster that works, and resumed where it is paused, every job comes to an end."""
        self.world.cluster.unreachable = False
        for _ in range(40):
            self.world.clock.advance(1000)
            self.tick()
            left = [job_id for job_id in self.reported if self.do(self.world.state(job_id)) not in TERMINAL]
            if not left:
                break
            for job_id in left:
                self.resume(job_id)
                if self.alive(job_id):
                    self.finish(job_id, "succeed")
        assert not left
        for job_id, steps in self.reported.items():
            keys = [event.key for event in self.do(self.world.events(job_id)) if event.type == "metrics"]
            assert sorted(keys) == sorted(f"metrics:train:{step}" for step in steps)

    @invariant()
    def an_ended_job_stays_as_it_is(self) -> None:
        for job_id in self.reported:
            state = self.do(self.world.state(job_id))
            if state in TERMINAL:
                assert self.ended.setdefault(job_id, state) is state
            else:
                assert job_id not in self.ended

    @invariant()
    def the_moves_in_the_events_give_the_state(self) -> None:
        allowed = {(state, target) for state in State for target in TABLE[state].values() if target is not None}
        for job_id in self.reported:
            state: State | None = None
            for event in self.do(self.world.events(job_id)):
                if event.to_state is None:
                    continue
                assert event.from_state == (state.value if state else None)
                assert event.actor in ("user", "reconciler")
                assert event.message
                assert state is None or (state, State(event.to_state)) in allowed
                state = State(event.to_state)
            assert state is self.do(self.world.state(job_id))

    @invariant()
    def every_attempt_is_submitted_once_and_in_order(self) -> None:
        for job_id in self.reported:
            submitted = self.world.submissions_of(job_id)
            assert submitted == [ids.submission_id(job_id, n + 1) for n in range(len(submitted))]
            allowed = self.world.settings.max_attempts + self.pauses[job_id]
            assert len(submitted) <= self.attempt(job_id) <= allowed

    @invariant()
    def no_more_jobs_than_allowed_are_on_the_cluster(self) -> None:
        states = [self.do(self.world.state(job_id)) for job_id in self.reported]
        assert sum(state in ON_CLUSTER for state in states) <= LIMIT

    @invariant()
    def a_job_is_paused_because_it_was_asked_to(self) -> None:
        for job_id in self.reported:
            job = self.do(self.world.job(job_id))
            assert (job.paused_at is not None) is (job.job_state is State.PAUSED)
            assert job.job_state not in (State.PAUSING, State.PAUSED) or self.pauses[job_id]
            assert job.failures < self.world.settings.max_attempts

    @invariant()
    def what_ended_matches_what_happened(self) -> None:
        for job_id, state in self.ended.items():
            job = self.do(self.world.job(job_id))
            assert (job.finished_at is not None) is True
            assert (job.fine_tuned_model is not None) is (state is State.SUCCEEDED)
            assert (job.error_code is not None) is (state is State.FAILED)
            assert state is not State.CANCELLED or job_id in self.cancelled


Jobs.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
test_jobs = Jobs.TestCase
