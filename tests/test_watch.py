"""What the watch makes of signs of life and reports, over a real store."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from rubiks import watch
from rubiks.board import Beat, Board, Report
from rubiks.errors import InputError
from rubiks.stopping import Interrupted
from rubiks.watch import Failure, Watch, status_of

TIMEOUT = 20.0


class Cluster:
    """A board of three processes on two hosts, and time that passes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.board = Board(dist.HashStore(), 3)
        self.watch = Watch(self.board, range(3), TIMEOUT)
        self.steps: list[int | None] = [None, None, None]
        self.silent: set[int] = set()
        self.done: set[int] = set()
        self._number = 0

    def passes(self, seconds: float) -> Exception | None:
        """What is found within this time, in which all but the silent processes give signs of life."""
        for _ in range(round(seconds)):
            self.now += 1
            self._number += 1
            for rank, host in enumerate(("left", "left", "right")):
                if rank not in self.silent:
                    self.board.beat(rank, Beat(host, self._number, self.steps[rank], rank in self.done))
            cause = self.watch.look()
            if cause is not None:
                return cause
        return None


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch)


def test_processes_that_live_may_take_long_before_and_after_training(cluster):
    assert cluster.passes(300) is None
    cluster.steps = [4, None, 4]
    assert cluster.passes(300) is None


@pytest.mark.parametrize(
    ("reports", "kind", "status", "words"),
    [
        ({2: Report("defect", "Traceback x")}, Failure, 1, "process 2 of 3 on right failed:\nTraceback x"),
        ({2: Report("input", "bad file")}, InputError, 2, "process 2 of 3 on right: bad file"),
        ({0: Report("input", "bad file"), 1: Report("input", "bad file")}, InputError, 2, "bad file"),
        ({0: Report("lost", "gloo"), 1: Report("defect", "x")}, Failure, 1, "process 1 of 3 on left failed:\nx"),
        ({1: Report("defect", "x"), 2: Report("input", "y")}, InputError, 2, "process 2 of 3 on right: y"),
        ({1: Report("killed", "", 9)}, InputError, 2, "process 1 of 3 on left was killed (SIGKILL)"),
        ({1: Report("lost", "gloo")}, Failure, 1, "process 1 of 3 on left lost its connection to the others:\ngloo"),
        ({1: Report("signal", "to resume", 15)}, Interrupted, 143, "interrupted by SIGTERM: to resume"),
        ({0: Report("lost", "gloo"), 1: Report("signal", "", 10)}, Interrupted, 138, "interrupted by SIGUSR1"),
    ],
)
def test_the_best_explanation_is_the_cause(reports, kind, status, words, cluster):
    assert cluster.passes(2) is None
    for rank, report in reports.items():
        cluster.board.report(rank, report)
    cause = cluster.passes(35)
    assert isinstance(cause, kind)
    assert status_of(cause) == status
    assert str(cause).startswith(words)


def test_a_cause_may_be_reported_after_its_consequence(cluster):
    cluster.board.report(0, Report("lost", "gloo"))
    assert cluster.passes(5) is None
    cluster.board.report(1, Report("defect", "the cause"))
    assert "the cause" in str(cluster.passes(3))


def test_the_first_report_of_a_process_stays(cluster):
    for report in (Report("input", "first"), Report("defect", "second")):
        cluster.board.report(1, report)
    assert cluster.board.reports() == {1: Report("input", "first")}


def test_reports_of_all_need_no_waiting(cluster):
    for rank in range(2):
        cluster.board.report(rank, Report("signal", f"text of {rank}", 15))
    assert cluster.passes(2) is None
    cluster.done = {2}
    assert str(cluster.passes(1)) == "interrupted by SIGTERM: text of 0"


def test_a_silent_process_is_named(cluster):
    assert cluster.passes(2) is None
    cluster.silent = {2}
    assert cluster.passes(TIMEOUT - 2) is None
    cause = cluster.passes(4)
    assert isinstance(cause, InputError)
    assert str(cause).startswith("process 2 of 3 on right no longer answers")


def test_a_process_without_answer_explains_lost_connections(cluster):
    assert cluster.passes(2) is None
    cluster.silent = {1}
    cluster.board.report(0, Report("lost", "gloo"))
    assert str(cluster.passes(12)).startswith("process 1 of 3 on left no longer answers")


def test_a_process_that_has_finished_may_be_silent(cluster):
    cluster.done = {1, 2}
    assert cluster.passes(2) is None
    cluster.silent = {1, 2}
    assert cluster.passes(200) is None


def test_the_process_that_is_behind_hangs(cluster):
    for step in range(60):
        cluster.steps = [step, step, min(step, 30)]
        assert cluster.passes(1) is None  # as long as any moves
    cause = cluster.passes(TIMEOUT + 2)
    assert isinstance(cause, InputError)
    assert str(cause).startswith("process 2 of 3 on right hangs: the others waited for it for 20 s (process_timeout)")


def test_time_in_which_the_watch_is_suspended_does_not_count(cluster):
    cluster.steps = [3, 3, 3]
    assert cluster.passes(2) is None
    cluster.now += 1000
    assert cluster.watch.look() is None
    assert cluster.passes(2) is None


def test_only_the_first_end_counts(cluster):
    assert cluster.board.ended() is None
    assert cluster.board.end(2)
    assert not cluster.board.end(1)
    assert cluster.board.ended() == 2
