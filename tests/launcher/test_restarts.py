"""The decisions after an attempt: restart or exit, and whose fault it was."""

from __future__ import annotations

from typing import Any

import pytest

from efflaunch.launcher.agent.restart_policy import AttemptOutcome, RankReport, first_failure, next_action

CRASH = 1


def run(
    steps: list[int], *, max_restarts: int = 2, start_step: int = 0, last_code: int = CRASH, stopping: bool = False
) -> tuple[bool, int, str]:
    """Feed crashes that got to `steps`, the last one ending with `last_code`."""
    *earlier, last = steps
    history = [AttemptOutcome(exit_code=CRASH, step=step) for step in earlier]
    outcome = AttemptOutcome(exit_code=last_code, step=last)
    action = next_action(outcome, history, start_step=start_step, max_restarts=max_restarts, stopping=stopping)
    return action.restart, action.exit_code, action.reason


@pytest.mark.parametrize(
    ("steps", "max_restarts", "restarts"),
    [
        ([0], 2, True),
        ([0, 0], 2, True),
        ([0, 0, 0], 2, False),
        ([5, 5], 2, True),
        ([5, 5, 5], 2, False),
        ([5, 5, 5, 6], 2, True),
        ([0, 0, 5, 5, 5], 2, False),
        ([0, 0, 5, 5, 7, 7], 2, True),
        ([3, 4, 5, 6, 7, 8, 9], 1, True),
        ([9, 5, 8], 1, False),
        ([0], 0, False),
        ([5], 0, False),
    ],
)
def test_budget(steps: list[int], max_restarts: int, restarts: bool) -> None:
    restart, code, reason = run(steps, max_restarts=max_restarts)
    assert restart is restarts and code == CRASH
    assert reason.startswith("restart ") is restarts


def test_budget_is_in_the_reason() -> None:
    assert run([0, 0])[2] == "restart 2 of 2 since the last progress"
    assert run([4, 4, 4], start_step=4)[2] == "failed 3 times without getting past step 4"


def test_progress_counts_from_where_the_launch_began() -> None:
    assert not run([4, 4, 4], start_step=4)[0]
    assert run([4, 4, 5], start_step=4)[0]


@pytest.mark.parametrize("code", [0, 75, 93])
@pytest.mark.parametrize("stopping", [False, True])
def test_settled_codes_pass_through(code: int, stopping: bool) -> None:
    assert run([3], last_code=code, stopping=stopping)[:2] == (False, code)


def test_no_restart_once_asked_to_stop() -> None:
    assert run([3], stopping=True) == (False, 1, "told to stop, but failed before everything was saved")


def report(rank: int, code: int | None, *, ended: bool = False, error: tuple[str, str, float] | None = None) -> RankReport:
    record: dict[str, Any] | None = None
    if error is not None:
        record = {"type": error[0], "message": error[1], "time": error[2]}
    return RankReport(rank=rank, exit_code=code, stopped_by_agent=ended, record=record)


LOST = ("RuntimeError", "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:37275", 1.0)


@pytest.mark.parametrize(
    ("reports", "guilty"),
    [
        ([report(0, 1, error=LOST), report(1, -9), report(2, -9, ended=True)], 1),
        ([report(0, 1, error=LOST), report(1, 1, error=("ValueError", "bad", 2.0)), report(2, 1, error=LOST)], 1),
        ([report(0, 1, error=("ValueError", "bad", 5.0)), report(1, 1, error=("ValueError", "worse", 4.0))], 1),
        ([report(0, -6), report(1, 1, error=("ValueError", "bad", 2.0))], 1),
        ([report(0, 1, error=LOST), report(1, 0), report(2, -9, ended=True)], 1),
        ([report(0, 0), report(1, -11)], 1),
        ([report(0, -9, ended=True), report(1, 1, error=("DistBackendError", "NCCL", 3.0)), report(2, 1, error=LOST)], 2),
        ([report(0, None), report(1, -7)], 1),
    ],
)
def test_first_failure(reports: list[RankReport], guilty: int) -> None:
    first = first_failure(reports)
    assert first is not None and first.rank == guilty


def test_nobody_failed_first_when_all_were_killed() -> None:
    assert first_failure([report(0, -9, ended=True), report(1, -9, ended=True)]) is None
