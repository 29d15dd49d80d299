"""What ranks say to each other in real steps: one order in each group, all ranks in its first call, nobody waits in a circle."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

from efflaunch.parallel.pipeline.config import PipelineOrder
from efflaunch.parallel.topology import build_topology
from efflaunch.parallel.warm_up import warm_up
from efflaunch.tests.collectives import Call, check_first_calls, check_ledgers, check_no_circle, check_one_order, recorded
from efflaunch.tests.parity import ranks_side
from efflaunch.tests.parity.test_parity import ADAPTIVE, ALL, batch, make_documents, plan_of, reference, static
from efflaunch.tests.ranks import RankPool

ACCUMULATED = (*(batch((0, 2, 2, (i,))) for i in (0, 1, 2)), batch((0, 1, 1, (3,)), (1, 1, 1, (4,))))
RUNS = {
    "adaptive": ({}, plan_of(4, *ADAPTIVE)),
    "adaptive, replicas, reduced each time": ({"replicate": 2, "reduce_each": True, "policy": "streambp"}, plan_of(4, *ADAPTIVE)),
    "adaptive, barrier-free": ({"barrier_free": True, "policy": "recompute"}, plan_of(4, *ADAPTIVE)),
    "barrier-free, replicas, segments": (
        {"barrier_free": True, "replicate": 2, "policy": "segments_3_host", "family": "llama_deep"}, plan_of(4, *ADAPTIVE),
    ),
    "a rank without work": ({"policy": "upipe_stored"}, plan_of(4, batch((0, 2, 2, ALL[:3]), (2, 1, 1, ALL[3:])))),
    "ranks without rows in a ring": ({}, plan_of(4, batch((0, 4, 1, (0,))), lengths=(3,))),
    "ranks without rows in a Ulysses group": ({"policy": "shares_streamed"}, plan_of(4, batch((0, 4, 4, (0,))), lengths=(3,))),
    "hybrid": ({"policy": "shares_streamed"}, static(4, 4, 2)),
    "shared experts": ({"family": "mixtral", "ep": 2}, plan_of(4, *ADAPTIVE)),
    "two stages": ({"stages": 2, "policy": "recompute"}, plan_of(2, *ACCUMULATED)),
    "two stages, tied, GPipe": (
        {"stages": 2, "family": "llama_mha_tied", "order": PipelineOrder.GPIPE, "gpipe": 5}, plan_of(2, *ACCUMULATED),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def _warm(**settings):
    topology = build_topology(**settings)
    warm_up(topology, torch.device("cpu"))
    return topology


def run_recorded(case, *args, warm=True):
    with mock.patch.object(ranks_side, "build_topology", _warm if warm else build_topology):
        return recorded(ranks_side.run_plans, case, *args)[1:]


def run_cold(*args):
    return run_recorded(*args, warm=False)


def of_run(pool, name, work=run_recorded, steps=1):
    """The calls of every rank, and the ranks of every group."""
    case, plan = RUNS[name]
    case = {"family": "llama", "dtype": "float64", **case}
    documents, targets = make_documents(plan.lengths)
    weights = reference(case["family"], case["dtype"], plan.lengths, False, 0.0, 0)[0]
    ranks = plan.world_size * case.get("stages", 1)
    answers = pool.run(work, case, weights, documents, targets, [plan], steps, ranks=ranks)
    members = {}
    for _, groups in answers:
        members |= groups
    return [ledger for ledger, _ in answers], members


@pytest.mark.parametrize("name", RUNS)
def test_ranks_make_the_same_calls_in_one_order(pool, name):
    ledgers, members = of_run(pool, name)
    check_ledgers(ledgers, members)
    assert all(len(ledger) > 20 for ledger in ledgers) and len(members) >= 3
    check_ledgers_can_fail(ledgers, members)


def check_ledgers_can_fail(ledgers, members):
    """A call that one rank leaves out, or makes with other numbers, is seen."""
    rank, at = next((rank, at) for rank, ledger in enumerate(ledgers) for at, call in enumerate(ledger) if call.operation == "allreduce_")
    less = [ledger[:at] + ledger[at + 1 :] if number == rank else ledger for number, ledger in enumerate(ledgers)]
    with pytest.raises(AssertionError, match="collectives on rank|call 0"):
        check_one_order(less, members)
    with pytest.raises(AssertionError, match="circle"):
        check_no_circle(less, members)
    other = dataclasses.replace(ledgers[rank][at], sizes=(99,))
    with pytest.raises(AssertionError, match="99"):
        check_one_order([[*ledger[:at], other, *ledger[at + 1 :]] if n == rank else ledger for n, ledger in enumerate(ledgers)], members)


def test_without_a_warm_up_a_ring_begins_without_its_ranks_without_rows(pool):
    """What torch.distributed.batch_isend_irecv forbids: the check sees it where groups were not used before."""
    ledgers, members = of_run(pool, "ranks without rows in a ring", run_cold, steps=0)
    check_one_order(ledgers, members)
    with pytest.raises(AssertionError, match="begins with"):
        check_first_calls(ledgers, members)


def test_a_circle_is_seen():
    a, b = (Call(group, "allreduce_", (1,), "torch.float32") for group in "ab")
    members = {"a": (0, 1), "b": (0, 1)}
    check_no_circle([[a, b], [a, b]], members)
    with pytest.raises(AssertionError, match="circle"):
        check_no_circle([[a, b], [b, a]], members)
    three = {"a": (0, 1), "b": (1, 2), "c": (0, 2)}
    c = dataclasses.replace(a, group="c")
    check_no_circle([[a, c], [a, b], [b, c]], three)
    with pytest.raises(AssertionError, match="circle"):
        check_no_circle([[c, a], [a, b], [b, c]], three)
