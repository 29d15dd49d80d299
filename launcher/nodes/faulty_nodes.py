"""Finds the nodes an attempt failed on, as far as that is known, and which of them a run stops using. Pure."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ...errors import EXIT_RETRY, EXIT_USER
from ..config.run_config import SeveralNodes
from ..rundir.state import Attempt, Failure, RunState

REPEATS = 2
"""Attempts of one launch that have to fail on a node before it is left out. One may be chance; a preflight is none."""
_DEADLY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Signals that count against a node. Not SIGABRT: NCCL's watchdog ends healthy ranks with it, where another one is stuck."""
_HARDWARE = (
    "ecc error",
    "hardware stack error",
    "nvlink error",
    "fallen off the bus",
    "device is lost",
    "unspecified launch failure",
    "no cuda-capable device",
    "cuda driver initialization failed",
    "input/output error",
)
"""Words of CUDA, its driver and the kernel about devices that break."""


def blame(failure: Failure | None, *, hosts: Sequence[str], lost: Sequence[str], ranks_per_node: int) -> dict[str, str]:
    """Node -> why, for what looks like its hardware: nodes that are gone, and that of a rank that was killed or named a broken device."""
    if failure is not None and failure.is_user_error:
        return {}
    blamed = dict.fromkeys(lost, "ended without a word")
    if failure is None or not 0 <= failure.rank < len(hosts) * ranks_per_node:
        return blamed
    killed = failure.exit_code is not None and -failure.exit_code in _DEADLY
    if killed or any(text in failure.message.lower() for text in _HARDWARE):
        blamed.setdefault(hosts[failure.rank // ranks_per_node], failure.message.splitlines()[0])
    return blamed


def exclusions(attempts: Sequence[Attempt], excluded: Mapping[str, str], limit: int) -> dict[str, str]:
    """Nodes to leave out from now on, with reasons, after the last of `attempts` (those of one launch).

    At once: what failed the preflight, where that is not most of the nodes (then it is not the nodes). Otherwise what
    REPEATS attempts failed on. Not more than `limit` with those in `excluded`; nothing where it would be more.
    """
    last = attempts[-1]
    suspects: dict[str, str] = {}
    if is_refused(last):
        if 2 * len(last.blamed) <= len(last.hosts):
            suspects = {host: f"failed the preflight: {why}" for host, why in last.blamed.items()}
    else:
        for host, why in last.blamed.items():
            times = sum(host in attempt.blamed for attempt in attempts)
            if times >= REPEATS:
                suspects[host] = f"{times} attempts failed on it, the last one: {why}"
    new = {host: why for host, why in suspects.items() if host not in excluded}
    return new if len(excluded) + len(new) <= limit else {}


def leave_out(run_state: RunState, nodes: SeveralNodes, is_enough: Callable[[list[str]], bool]) -> tuple[RunState, dict[str, str]]:
    """(state, nodes the run stops using after its last attempt, each with the reason); none where too few would be left.

    `is_enough(names)`: whether the run can resume without the nodes of these names.
    """
    new = exclusions(run_state.launch_attempts, run_state.excluded, nodes.max_excluded)
    without = replace(run_state, excluded={**run_state.excluded, **new})
    if not new or not is_enough(excluded_names(without, nodes)):
        return run_state, {}
    *earlier, last = run_state.attempts
    if is_refused(last):
        # Without these nodes it does not fail again in the same way.
        assert last.failure is not None, "a preflight says why"
        last = replace(last, exit_code=EXIT_RETRY, failure=replace(last.failure, is_user_error=False))
    return replace(without, attempts=(*earlier, last)), new


def excluded_names(run_state: RunState, nodes: SeveralNodes) -> list[str]:
    """Nodes not to use: those of the configuration, then those the run has left out."""
    return list(dict.fromkeys([*nodes.exclude, *run_state.excluded]))


def is_refused(attempt: Attempt) -> bool:
    """Return whether the preflight ended the attempt."""
    return attempt.exit_code == EXIT_USER and bool(attempt.blamed)
