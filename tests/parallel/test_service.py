"""The planning process: ahead of time, late, broken, killed, orphaned; and plans that survive packing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.parallel.sequence import service as service_module
from efflaunch.parallel.sequence.packed import pack_plan, packed_size, unpack_plan
from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan
from efflaunch.parallel.sequence.service import PlanService, static_plan
from efflaunch.tests.limits import ENDS_S, wait_until
from efflaunch.tests.parallel.fake_requests import cost_of_four, request_for

COST = cost_of_four(100)
STEPS = 12


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """However long the process takes to start."""
    monkeypatch.setattr(service_module, "FIRST_PATIENCE_S", ENDS_S)


def lengths_of(step):
    return (10 * step + 10, 7, 100)


def request(solver):
    return request_for(COST, f"efflaunch.tests.parallel.fake_solvers:{solver}")


def begun(solver, patience_s=ENDS_S, **more):
    service = PlanService(patience_s=patience_s, **more)
    service.begin(lengths_of, STEPS, request(solver))
    return service


def test_plans_of_every_step_and_what_static_would_have_cost():
    with begun("quick") as service:
        for step in range(STEPS):
            plan = service.plan(step)
            assert plan.lengths == lengths_of(step) and plan.source == "adaptive" and len(plan.micro_batches) == 3
            assert plan.predicted_s == pytest.approx(COST.plan_s(plan), rel=1e-12)
            wait_until(lambda step=step: service.extras(step) is not None, "no extras")
            assert service.extras(step).static_s == static_plan(lengths_of(step), request("quick")).predicted_s
        assert service.failure == ""
    assert not psutil.pid_exists(service.pid)


def test_plans_are_made_ahead():
    with begun("quick") as service:
        assert service.plan(0) is not None
        wait_until(lambda: all(step in service._plans for step in (1, 2, 3, 4)), "the plans of the next four steps")
        service._patience_s = 0.0
        assert all(service.plan(step) is not None for step in (1, 2, 3, 4))


def test_a_late_plan_is_not_waited_for_and_the_next_ones_come_again(tmp_path, monkeypatch):
    """The solver is not done before the rank has gone on without its plan."""
    monkeypatch.setenv("SOLVER_WAITS_FOR", str(tmp_path / "go"))
    with begun("late_at_50", patience_s=0.05, ahead=1) as service:
        assert service.plan(3) is not None
        assert service.plan(4) is None and service.failure == ""
        (tmp_path / "go").touch()
        wait_until(lambda: service.plan(5) is not None, "the process never caught up")


def test_a_solver_that_raises_is_a_failure_with_its_text():
    with begun("broken") as service:
        assert service.plan(0) is None
        assert service.failure == "planning step 1 failed: ZeroDivisionError: a bug in the solver"


def test_a_killed_process_is_noticed_at_once():
    """However patient the rank is."""
    with begun("quick", patience_s=1e6) as service:
        assert service.plan(0) is not None
        os.kill(service.pid, signal.SIGKILL)
        wait_until(lambda: service.failure, "not noticed")
        assert service.failure == "the planning process was killed by SIGKILL"
        assert service.plan(STEPS - 1) is None


def test_a_process_that_ends_by_itself_is_noticed():
    with begun("dies_at_50") as service:
        wait_until(lambda: service.plan(4) is None, "it should die")
        assert service.failure == "the planning process ended with exit code 7"


def test_a_stopped_process_holds_nobody_up():
    with begun("quick", patience_s=0.05) as service:
        assert service.plan(0) is not None
        os.kill(service.pid, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(service.pid).status() == psutil.STATUS_STOPPED, "not stopped")
        plans = [service.plan(step) for step in range(1, STEPS)]
        assert plans[-1] is None and service.failure == ""
    assert not psutil.pid_exists(service.pid)


def test_stop_signals_pass_it_by():
    with begun("quick") as service:
        assert service.plan(0) is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
            os.kill(service.pid, number)
        assert all(service.plan(step) is not None for step in range(1, STEPS))


def test_it_does_not_outlive_a_killed_rank(tmp_path):
    """SIGKILL, in the middle of a long solve."""
    code = (
        "import sys, time; from efflaunch.tests.parallel import test_service as t\n"
        "s = t.begun('late_at_50')\n"
        "s._ask(4); print(s.pid, flush=True); time.sleep(600)"
    )
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3]), "SOLVER_WAITS_FOR": str(tmp_path / "go")}
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=variables, text=True)
    pid = int(rank.stdout.readline())
    wait_until((tmp_path / "go.awaited").exists, "the solve never began")
    rank.kill()
    assert rank.wait() == -signal.SIGKILL
    rank.stdout.close()
    # A solve is not interrupted; once it is over nobody is there who asked for it.
    (tmp_path / "go").touch()
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "the planning process leaked")


@st.composite
def plans(draw):
    """Any partition of sequences into groups and micro-batches; validity does not matter to packing."""
    lengths = draw(st.lists(st.integers(1, 2**40), min_size=1, max_size=9))
    order = list(draw(st.permutations(range(len(lengths)))))
    seconds = st.none() | st.floats(0, 1e9)
    batches: list[list[Group]] = []
    while order:
        held = [order.pop() for _ in range(draw(st.integers(1, len(order))))]
        group = Group(draw(st.integers(0, 2**20)), draw(st.sampled_from([1, 2, 1024])), 1, tuple(held), predicted_s=draw(seconds))
        if batches and draw(st.booleans()):
            batches[-1].append(group)
        else:
            batches.append([group])
    made = tuple(MicroBatch(tuple(groups)) for groups in batches)
    source, bound = draw(st.sampled_from(["static", "adaptive", "greedy", "late"])), draw(st.sampled_from(["", "staircase", "class MILP"]))
    return StepPlan(2048, tuple(lengths), made, predicted_s=draw(seconds), lower_bound_s=draw(seconds), bound=bound, source=source)


@settings(deadline=None)
@given(plan=plans())
def test_packing_keeps_every_bit(plan):
    packed = pack_plan(plan)
    assert packed.dtype == np.int64 and len(packed) == packed_size(len(plan.lengths))
    got = unpack_plan(packed, plan.world_size, plan.lengths)
    assert repr(got) == repr(plan)
