"""Plans on real ranks: the same everywhere, the same again, greedy where the planning process is late or gone."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict, replace

import pytest
import torch.distributed as dist

from efflaunch.cluster.rates import Copies, MachineRates, MeasuredRates
from efflaunch.errors import PlanError
from efflaunch.launcher.config.compose import compose
from efflaunch.parallel.config import SequenceMode
from efflaunch.parallel.sequence import service as service_module
from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.parallel.sequence.plan import check_plan
from efflaunch.parallel.sequence.service import PlanService, static_plan
from efflaunch.parallel.sequence.solve import solve_adaptive, solve_greedy
from efflaunch.parallel.sequence.stored import load_cost
from efflaunch.tests.limits import ENDS_S
from efflaunch.tests.parallel.fake_requests import cost_of_four, request_for
from efflaunch.tests.ranks import RankPool
from efflaunch.training.step_planner import StepPlanner

COST = cost_of_four(128)
STEPS = 8


def lengths_of(step):
    return tuple(1 + (37 * (step + 3) * (index + 1)) % 250 for index in range(6 + step)) + (500,)


def request(solver="adaptive"):
    return request_for(COST, solver)


def plan_steps(mode, solver="adaptive", patience_s=ENDS_S, kill_at=-1, stop_at=-1):
    """On every rank: its plans as text, the totals, what was reported."""
    reports = []
    # However long the process takes to start.
    service_module.FIRST_PATIENCE_S = ENDS_S
    service = PlanService(patience_s=patience_s) if mode == "adaptive" and dist.get_rank() == 0 else None
    try:
        planner = StepPlanner(
            lengths_of, STEPS, request(solver), SequenceMode(mode),
            service=service, barrier_free=False, report=lambda event, **fields: reports.append((event, fields)),
        )  # fmt: skip
        plans = []
        for step in range(STEPS):
            if service is not None and step in (kill_at, stop_at):
                os.kill(service.pid, signal.SIGKILL if step == kill_at else signal.SIGSTOP)
                while step == kill_at and not service.failure:
                    time.sleep(0.01)
            plans.append(planner.plan(step))
            check_plan(plans[-1])
        return [repr(plan) for plan in plans], [plan.source for plan in plans], asdict(planner.totals), reports
    finally:
        if service is not None:
            service.close()


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def test_every_rank_has_the_same_adaptive_plan_and_it_comes_again(pool):
    answers = pool.run(plan_steps, "adaptive", ranks=4)
    expected = [repr(solve_adaptive(lengths_of(step), COST)) for step in range(STEPS)]
    for plans, sources, totals, reports in answers:
        assert plans == expected and "late" not in sources and totals["late"] == 0 and not reports
    assert pool.run(plan_steps, "adaptive", ranks=4)[3][0] == expected


def test_static_plans_are_the_static_solver_s(pool):
    for plans, _, _, _ in pool.run(plan_steps, "static", ranks=4):
        assert plans == [repr(static_plan(lengths_of(step), request())) for step in range(STEPS)]


def test_a_killed_planning_process_is_reported_once_and_greedy_plans_follow(pool):
    answers = pool.run(plan_steps, "adaptive", "adaptive", 20.0, 3, ranks=4)
    assert all(answer[:2] == answers[0][:2] for answer in answers)
    assert answers[0][1][3:] == ["greedy"] * (STEPS - 3) and answers[0][2]["unplanned"] == STEPS - 3
    ((event, fields),) = answers[0][3]
    assert event == "planner_failed" and fields == {"step": 4, "error": "the planning process was killed by SIGKILL"}
    assert [answer[3] for answer in answers[1:]] == [[]] * 3 and answers[0][2]["late"] == 0


def test_late_plans_are_greedy_and_counted(pool):
    answers = pool.run(plan_steps, "adaptive", "adaptive", 0.05, -1, 1, ranks=4)
    plans, sources, totals, reports = answers[0]
    late = sources.count("late")
    assert late == totals["late"] >= 1 and not reports
    assert all(answer[:2] == (plans, sources) for answer in answers)
    step = sources.index("late")
    assert plans[step].partition("micro_batches=")[2].startswith(repr(solve_greedy(lengths_of(step), COST).micro_batches)[:40])


def test_a_broken_solver_is_reported_once(pool):
    answers = pool.run(plan_steps, "adaptive", "efflaunch.tests.parallel.fake_solvers:broken", ranks=4)
    assert answers[0][1] == ["greedy"] * STEPS
    ((event, fields),) = answers[0][3]
    assert event == "planner_failed" and "a bug in the solver" in fields["error"]


def plan_too_long():
    service = PlanService(patience_s=ENDS_S) if dist.get_rank() == 0 else None
    try:
        planner = StepPlanner(
            lambda step: (5, 513), 1, request(), SequenceMode.ADAPTIVE, service=service, barrier_free=False, report=lambda *a, **k: None
        )
        with pytest.raises(PlanError, match="513 tokens") as caught:
            planner.plan(0)
        return str(caught.value)
    finally:
        if service is not None:
            service.close()


def test_a_sequence_that_fits_nowhere_is_the_same_error_on_every_rank(pool):
    messages = pool.run(plan_too_long, ranks=4)
    assert len(messages) == 4 and len(set(messages)) == 1


def test_a_cost_model_goes_through_json_unchanged():
    windowed = CostModel(
        world_size=3,
        tokens_per_rank=7,
        degrees=(DegreeCost(degree=1, ulysses=1, attention_s=0.1 + 0.2, linear_s=1 / 3, windowed_s=((16, 1e-9), (64, 2e-9))),),
        excluded=((2, "why"),),
        source="profile",
    )
    for cost in (COST, windowed):
        assert load_cost(json.loads(json.dumps(asdict(cost)))) == cost


def test_settings_decide_whether_a_stored_cost_model_is_used_again(tmp_path, monkeypatch):
    import torch

    from efflaunch.launcher.config.ledger import plan
    from efflaunch.training.step_planner import resolve_costs

    def settled(stored, *words, measured=None):
        config = compose(["+experiment=quickstart", *words])
        return resolve_costs(config, replace(plan(config).inputs, measured=measured), torch.device("cpu"), stored)

    monkeypatch.chdir(tmp_path)
    first = settled(None)
    stored = json.loads(json.dumps({**first.dump(), "overhead_s": 0.25}))
    assert settled(stored, "train.steps=99").overhead_s == 0.25
    copies = (Copies(out=1e9, back=1e9, both_out=1e9, both_back=1e9),) * 4
    rates = MachineRates(device="cpu", ranks_per_node=4, link=copies, device_update=1e9, host_update=1e9)
    assert settled(stored, measured=MeasuredRates(rates=rates, source="since")).overhead_s == 0.25, "a new measurement is no new setting"
    other = settled(stored, "memory=recompute")
    assert other.overhead_s == 0.0 and other.fingerprint != first.fingerprint
