"""Plans of the next steps, made ahead in one separate process beside rank 0, so that no step waits for its plan.

    with PlanService(patience_s=0.25) as service:  # the process starts
        service.begin(lengths_of, num_steps, request)
        plan = service.plan(step)  # None: not there in time, or the process is gone

Note: life and death. The process is not forked but started, with nothing of the rank in it. It ends when its end of the socket
closes, which the kernel does however the rank ends, or when it finds its parent gone. Stop signals pass it by: a run that is told
to stop finishes its step. When it dies by itself, `failure` says so and the caller goes on without it.

Note: determinism. A plan is a function of the step's lengths and the PlanRequest: which process made it, or when, changes nothing.
Only a late plan does, and that is counted.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...utils.helper_thread import HelperThread
from ...utils.signal_mask import ignore_stop_signals, stop_signals_blocked
from ..pipeline.micro_batches import plan_for_stages
from .cost import CostModel
from .packed import pack_plan, unpack_plan
from .plan import StepPlan

log = logging.getLogger(__name__)
AHEAD = 4
"""Steps whose plans are asked for before they are needed."""
FIRST_PATIENCE_S = 30.0
"""Longest wait for the first plan of an attempt: the process has to start, and no step is running yet."""
STATIC_WORK = 5_000_000
"""Most sequences x groups for which the static plan is made on the side: a few seconds."""
CERTIFY_SHARE, LEAST_CERTIFY_S, MOST_CERTIFY_S = 0.25, 1.0, 10.0
"""The class MILP may take this share of a step, so steps under four seconds go without; plans are asked for further ahead than that."""
_POLL_S = 1.0
_END_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """All a plan depends on besides lengths."""

    cost: CostModel
    static_degree: int
    static_ulysses: int
    linear_cost_tokens: float
    """These three: the static plan that each step is compared with."""
    certify: bool = False
    """Look for tighter bounds of long steps: where the machine has a core to spare for it."""
    solver: str = "adaptive"
    """`adaptive`, or a `module:function` of (lengths, cost) that makes the StepPlan."""
    micro_batches: int | None = None
    """With several stages: micro-batches of a step, at least; None: as many as take least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extras:
    """What is known of a step besides its plan; made when the process has nothing else to do."""

    static_s: float | None
    """Modelled seconds of the static plan; None where there are too many sequences to make one on the side."""
    lower_bound_s: float | None = None
    """A tighter bound than the plan came with; None where none was looked for or found."""
    bound: str = ""


def solve(lengths: Sequence[int], request: PlanRequest) -> StepPlan:
    """The plan of a step; PlanError where a sequence fits nowhere."""
    return plan_for_stages(lengths, request.cost, _solver(request), longest_group=request.cost.largest, least=request.micro_batches)


def _solver(request: PlanRequest) -> Callable[[Sequence[int], CostModel], StepPlan]:
    if request.solver == "adaptive":
        from .solve import solve_adaptive

        return solve_adaptive
    import importlib

    module, _, name = request.solver.partition(":")
    solver: Callable[[Sequence[int], CostModel], StepPlan] = getattr(importlib.import_module(module), name)
    return solver


def static_plan(lengths: Sequence[int], request: PlanRequest) -> StepPlan:
    """What parallel.sequence=static would do, priced."""
    from .solve import solve_static

    def packed(lengths: Sequence[int], cost: CostModel) -> StepPlan:
        return solve_static(
            lengths,
            world_size=cost.world_size,
            degree=request.static_degree,
            ulysses=request.static_ulysses,
            tokens_per_rank=cost.tokens_per_rank,
            linear_cost_tokens=request.linear_cost_tokens,
        )

    degree, least = request.static_degree, request.micro_batches
    return request.cost.priced(plan_for_stages(lengths, request.cost, packed, longest_group=degree, least=least))


def greedy_plan(lengths: Sequence[int], request: PlanRequest) -> StepPlan:
    """The plan that needs no search, for want of a better one."""
    from .solve import solve_greedy

    return plan_for_stages(lengths, request.cost, solve_greedy, longest_group=request.cost.largest, least=request.micro_batches)


class PlanService:
    """The rank's side. Every method returns at once, except `plan`, which has a patience."""

    def __init__(self, *, patience_s: float, ahead: int = AHEAD) -> None:
        self.failure = ""
        """Why there are no more plans; empty while there are."""
        self._patience_s, self._ahead = patience_s, ahead
        self._asked, self._patient = -1, True
        self._plans: dict[int, Any] = {}
        self._extras: dict[int, Extras] = {}
        self._changed = threading.Condition()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._process, self._connection = _start_process()
        for name, run in (("plan requests", self._send), ("plans", self._receive)):
            HelperThread(run, name).start()

    def begin(self, lengths_of: Callable[[int], Sequence[int]], num_steps: int, request: PlanRequest) -> None:
        """Say what to plan: `lengths_of(step)` for steps below `num_steps`. Once."""
        self._lengths_of, self._num_steps, self._request = lengths_of, num_steps, request
        self._outbox.put(request)

    @property
    def pid(self) -> int:
        return self._process.pid

    def plan(self, step: int) -> StepPlan | None:
        """The step's plan, or None where it is not there within the patience or never will be. Asks for the next ones."""
        self._ask(step)
        patience, self._patient = max(self._patience_s, FIRST_PATIENCE_S * self._patient), False
        with self._changed:
            self._changed.wait_for(lambda: step in self._plans or self.failure, patience)
            packed = self._plans.get(step)
            self._plans = {key: value for key, value in self._plans.items() if key > step}
            self._extras = {key: value for key, value in self._extras.items() if key >= step}
        return None if packed is None else unpack_plan(packed, self._request.cost.world_size, self._lengths_of(step))

    def extras(self, step: int) -> Extras | None:
        """What is known of the step by now; forgotten once a later step was planned."""
        with self._changed:
            return self._extras.get(step)

    def pending(self, step: int) -> list[int]:
        """Steps from `step` on whose plans were asked for and not taken yet."""
        return list(range(step, self._asked + 1))

    def _ask(self, step: int) -> None:
        for wanted in range(max(step, self._asked + 1), min(step + self._ahead + 1, self._num_steps)):
            self._outbox.put(("plan", wanted, tuple(self._lengths_of(wanted))))
            self._asked = wanted
        self._outbox.put(("now", step, None))

    def _send(self) -> None:
        # A thread: a process that is stopped or busy must not hold up the rank once the socket is full.
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.send(message)
        except OSError:
            pass  # the receiving thread learns of it, and tells
        except Exception as error:  # what cannot be sent ends the planning, not the run: greedy plans follow
            self._fail(f"a request for plans cannot be sent: {type(error).__name__}: {error}")

    def _receive(self) -> None:
        try:
            while True:
                kind, step, content = self._connection.recv()
                with self._changed:
                    if kind == "failed":
                        raise _PlannerError(f"planning step {step + 1} failed: {content}")
                    (self._plans if kind == "plan" else self._extras)[step] = content
                    self._changed.notify_all()
        except _PlannerError as error:
            self._fail(str(error))
        except (EOFError, OSError):
            self._fail(f"the planning process {self._death()}")
        except Exception as error:  # as above
            self._fail(f"the planning process sent what is no plan: {type(error).__name__}: {error}")

    def _death(self) -> str:
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _fail(self, reason: str) -> None:
        with self._changed:
            self.failure = self.failure or reason
            self._changed.notify_all()

    def close(self) -> None:
        """End the process; none is left when this returns."""
        self._fail("closed")
        self._outbox.put(None)
        # Not close: the receiving thread may be reading from it.
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _PlannerError(Exception):
    """The solver raised; its text is all that crosses the process border."""


def _start_process() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    package = (__package__ or "").partition(".")[0]
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", f"{package}.parallel.sequence.service", str(theirs.fileno()), str(os.getpid())]
    with theirs, stop_signals_blocked():
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL
        )
    return process, Connection(ours.detach())


def serve(connection: Connection, parent: int) -> None:
    """The process's life: plans in the order they are needed, extras when there is time, until the rank is gone."""
    request: PlanRequest = connection.recv()
    wanted: dict[int, tuple[int, ...]] = {}
    without_extras: dict[int, StepPlan] = {}
    now = -1
    while os.getppid() == parent:
        while connection.poll(0 if wanted or without_extras else _POLL_S):
            kind, step, lengths = connection.recv()
            if kind == "now":
                now = max(now, step)
            else:
                wanted[step] = lengths
        # A step that has begun has no use for a plan any more.
        wanted = {step: lengths for step, lengths in wanted.items() if step >= now}
        without_extras = {step: plan for step, plan in without_extras.items() if step >= now}
        step = min(wanted or without_extras, default=-1)
        try:
            if wanted:
                without_extras[step] = solve(wanted.pop(step), request)
                connection.send(("plan", step, pack_plan(without_extras[step])))
            elif without_extras:
                connection.send(("extras", step, find_extras(without_extras.pop(step), request)))
        except OSError:
            raise
        except Exception as error:  # whatever the solver raises is reported by the rank, which goes on without it
            log.exception("step %d", step + 1)
            connection.send(("failed", step, f"{type(error).__name__}: {error}"))
            return


def find_extras(plan: StepPlan, request: PlanRequest) -> Extras:
    """The static plan's time, and for long steps a tighter bound, in a time that is small beside the step."""
    groups = request.cost.world_size // request.static_degree
    static_s = None
    if len(plan.lengths) * groups <= STATIC_WORK:
        static_s = static_plan(plan.lengths, request).predicted_s
    limit_s = min(MOST_CERTIFY_S, CERTIFY_SHARE * (plan.predicted_s or 0.0))
    if not request.certify or limit_s < LEAST_CERTIFY_S or plan.predicted_s is None or plan.lower_bound_s is None:
        return Extras(static_s=static_s)
    from .bound import class_milp_bound

    bound = class_milp_bound(plan.lengths, request.cost, plan_s=plan.predicted_s, time_limit_s=limit_s)
    if not bound.valid or bound.value_s <= plan.lower_bound_s:
        return Extras(static_s=static_s)
    return Extras(static_s=static_s, lower_bound_s=bound.value_s, bound=bound.name)


def main(arguments: list[str]) -> int:
    """`python -m efflaunch.parallel.sequence.service FD PARENT_PID`."""
    ignore_stop_signals()
    try:
        # The name with which the rank pickles what it sends.
        from importlib import import_module

        module = import_module(f"{(__package__ or '').partition('.')[0]}.parallel.sequence.service")
        module.serve(Connection(int(arguments[0])), int(arguments[1]))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the rank is gone
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
