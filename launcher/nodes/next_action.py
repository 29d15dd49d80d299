"""Decides what follows when the agents of a job have ended. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from ...errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_RETRY, EXIT_USER
from ..agent.restart_policy import AttemptOutcome
from ..config.run_config import LauncherConfig, SeveralNodes
from ..rundir.state import RunState


class Verdict(IntEnum):
    """The launcher's next action; the value is the exit code by which a batch script learns it."""

    DONE = EXIT_DONE
    FAIL = EXIT_RETRY
    STOP = EXIT_PREEMPTED
    """Stopped and saved, and not to be started again by itself."""
    AGAIN = 76
    """Start again at once, on the nodes there are."""
    REQUEUE = 77
    USER = EXIT_USER


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Budgets of what may be tried again; the newest step at submission is where progress is counted from."""

    max_restarts: int
    max_preemptions: int
    requeue: bool
    start_step: int
    keys: str = "launcher.slurm"
    """Config group in which a user finds `requeue` and `max_preemptions`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The verdict and its reason, a sentence."""

    verdict: Verdict
    reason: str


def decide_next(run_state: RunState, launcher: LauncherConfig, nodes: SeveralNodes, *, cancelled: bool, lost_node: bool) -> Decision:
    """Decide what follows the last attempt of this launch, which has ended (`decide`)."""
    limits = Limits(
        max_restarts=launcher.max_restarts,
        max_preemptions=nodes.max_preemptions,
        requeue=nodes.requeue,
        start_step=run_state.step_before,
        keys=nodes.KEYS,
    )
    outcomes = [
        AttemptOutcome(exit_code=EXIT_RETRY if attempt.exit_code is None else attempt.exit_code, step=attempt.last_step)
        for attempt in run_state.launch_attempts
    ]
    return decide(outcomes, limits, cancelled=cancelled, lost_node=lost_node)


def decide(outcomes: Sequence[AttemptOutcome], limits: Limits, *, cancelled: bool, lost_node: bool) -> Decision:
    """Decide what follows the last of `outcomes`, all those of one submission, oldest first.

    Preemptions and failures have budgets of their own. Either is also given up after max_restarts in a row
    without a new step. `lost_node`: an agent ended without a word, so these nodes are not used again as they are.
    """
    code = outcomes[-1].exit_code
    if code == EXIT_DONE:
        return Decision(verdict=Verdict.DONE, reason="finished")
    if code == EXIT_USER:
        return Decision(verdict=Verdict.USER, reason="would fail again in the same way")
    if code == EXIT_PREEMPTED:
        return _after_preemption(outcomes, limits, cancelled)
    if cancelled:
        return Decision(verdict=Verdict.FAIL, reason="told to stop, but failed before everything was saved")
    used = idle(outcomes, limits.start_step, EXIT_RETRY)
    if used > limits.max_restarts:
        return Decision(verdict=Verdict.FAIL, reason=f"failed {used} times without getting past step {outcomes[-1].step}")
    if lost_node and not limits.requeue:
        return Decision(verdict=Verdict.FAIL, reason=f"lost a node, and {limits.keys}.requeue=false")
    how = "requeued" if lost_node else "restart"
    verdict = Verdict.REQUEUE if lost_node else Verdict.AGAIN
    return Decision(verdict=verdict, reason=f"{how} {used} of {limits.max_restarts} since the last progress")


def _after_preemption(outcomes: Sequence[AttemptOutcome], limits: Limits, cancelled: bool) -> Decision:
    times = sum(outcome.exit_code == EXIT_PREEMPTED for outcome in outcomes)
    in_a_row = idle(outcomes, limits.start_step, EXIT_PREEMPTED)
    if cancelled or not limits.requeue:
        return Decision(verdict=Verdict.STOP, reason="stopped and saved")
    if times > limits.max_preemptions:
        return Decision(verdict=Verdict.STOP, reason=f"preempted {times} times, {limits.keys}.max_preemptions={limits.max_preemptions}")
    if in_a_row > limits.max_restarts:
        reason = f"preempted {in_a_row} times without getting past step {outcomes[-1].step}: the time limit may be too short"
        return Decision(verdict=Verdict.STOP, reason=reason)
    return Decision(verdict=Verdict.REQUEUE, reason=f"preempted and saved; requeued, {times} of {limits.max_preemptions}")


def idle(outcomes: Sequence[AttemptOutcome], start_step: int, exit_code: int) -> int:
    """Count outcomes of this exit code since one that got further than any before it, itself included."""
    count, best = 0, start_step
    for outcome in outcomes:
        if outcome.step > best:
            count, best = 0, outcome.step
        count += outcome.exit_code == exit_code
    return count
