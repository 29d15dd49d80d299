"""Decides what to do when an attempt has ended, and which rank ended it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_RETRY, EXIT_USER


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptOutcome:
    """How an attempt ended: the job's exit code, and the newest step the run had reached by then."""

    exit_code: int
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """Start again, or exit with `exit_code`; `reason` is a sentence."""

    restart: bool
    exit_code: int
    reason: str


def next_action(
    outcome: AttemptOutcome, history: Sequence[AttemptOutcome], *, start_step: int, max_restarts: int, stopping: bool
) -> Action:
    """Decide what follows `outcome`, given the earlier outcomes of this launch, which began at `start_step`.

    A crash is retried `max_restarts` times in a row; an attempt that got further than any before it gives the
    whole budget back. The same mistake of a user is never retried, and nothing is once a stop was asked for.
    """
    if outcome.exit_code == EXIT_DONE:
        return Action(restart=False, exit_code=EXIT_DONE, reason="finished")
    if outcome.exit_code == EXIT_PREEMPTED:
        return Action(restart=False, exit_code=EXIT_PREEMPTED, reason="stopped and saved")
    if outcome.exit_code == EXIT_USER:
        return Action(restart=False, exit_code=EXIT_USER, reason="would fail again in the same way")
    if stopping:
        return Action(restart=False, exit_code=EXIT_RETRY, reason="told to stop, but failed before everything was saved")
    used = _restarts_without_progress(outcome, history, start_step)
    if used >= max_restarts:
        return Action(restart=False, exit_code=EXIT_RETRY, reason=f"failed {used + 1} times without getting past step {outcome.step}")
    return Action(restart=True, exit_code=EXIT_RETRY, reason=f"restart {used + 1} of {max_restarts} since the last progress")


def _restarts_without_progress(outcome: AttemptOutcome, history: Sequence[AttemptOutcome], start_step: int) -> int:
    used, best = 0, start_step
    for earlier in history:
        if earlier.step > best:
            used, best = 0, earlier.step
        used += 1
    return 0 if outcome.step > best else used


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """How one rank's process ended. `record` is what it wrote about its own error, None where it could not."""

    rank: int
    exit_code: int | None
    """Negative: killed by that signal."""
    stopped_by_agent: bool
    record: dict[str, Any] | None


# What a healthy rank says when another one is gone.
_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "remote process exited",
    "socket closed",
    "failed to recv",
    "failed to send",
    "gloo/transport",
    "recvvalue failed",
    "sendbytes failed",
    "timed out waiting",
)
_LOST_PEER_TYPES = ("DistNetworkError", "DistBackendError", "DistStoreError")


def lost_a_peer(record: dict[str, Any]) -> bool:
    """Return whether this error only means that some other rank went away."""
    message = str(record.get("message", "")).lower()
    return record.get("type") in _LOST_PEER_TYPES or any(text in message for text in _LOST_PEER)


def first_failure(reports: Sequence[RankReport]) -> RankReport | None:
    """The rank that failed first: own errors by time, then deaths without a word, then ranks that lost a peer."""
    failed = [report for report in reports if not (report.stopped_by_agent and report.record is None)]
    own = [report for report in failed if report.record is not None and not lost_a_peer(report.record)]
    silent = sorted((report for report in failed if report.record is None), key=_suspicion)
    collateral = [report for report in failed if report.record is not None and lost_a_peer(report.record)]
    ordered = _by_time(own) + silent + _by_time(collateral)
    return ordered[0] if ordered else None


def _suspicion(report: RankReport) -> int:
    # A signal is a cause; a plain exit code may be a consequence. A rank that ends well by itself, ahead of the
    # others, gives no answer either.
    code = report.exit_code
    return 0 if code is not None and code < 0 else 1 if code else 2


def _by_time(reports: list[RankReport]) -> list[RankReport]:
    return sorted(reports, key=lambda report: float((report.record or {}).get("time", 0.0)))
