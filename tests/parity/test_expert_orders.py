"""Rows to experts in chunks, exchanged beside products, against plain Hugging Face: degrees, deferred weights, kinds of policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from efflaunch.estimate.timing.expert_order import _choose
from efflaunch.parallel.experts.layer_order import LayerOrder, in_order
from efflaunch.parallel.sequence.plan import StepPlan
from efflaunch.tests.parity.test_parity import ADAPTIVE, ALL, batch, check_parity, plan_of, static
from efflaunch.tests.ranks import RankPool

IDLE = plan_of(4, *ADAPTIVE)
"""Every degree of groups, and two ranks without tokens in the last micro-batch."""
ONE_GROUP = plan_of(4, batch((0, 2, 2, ALL)))


def order(forward: int, backward: int, *, defers: bool = False) -> LayerOrder:
    return LayerOrder(in_order(forward), in_order(backward, defers_weights=defers))


ROWS: dict[str, tuple[dict[str, Any], StepPlan]] = {
    f"{family}, EP {ep}, {forward} and {backward} chunks{', deferred' * defers}, {policy}, {what}": (
        {"family": family, "ep": ep, "expert_order": order(forward, backward, defers=defers), "policy": policy, **case},
        plan,
    )
    for family, ep, forward, backward, defers, policy, what, plan, case in (
        ("qwen3_moe", 2, 2, 2, False, "keep", "adaptive, idle ranks, three steps", IDLE, {"steps": 3}),
        ("qwen3_moe", 2, 4, 1, True, "recompute", "adaptive, idle ranks", IDLE, {}),
        ("qwen3_moe", 2, 1, 4, True, "shares_streamed", "adaptive, idle ranks", IDLE, {}),
        ("qwen3_moe", 4, 4, 2, True, "keep", "adaptive, idle ranks", IDLE, {}),
        ("qwen3_moe", 4, 2, 4, False, "recompute", "two ranks never with tokens", ONE_GROUP, {}),
        ("qwen3_moe", 4, 1, 1, True, "streambp", "adaptive, idle ranks", IDLE, {}),
        ("qwen2_moe", 2, 2, 3, True, "upipe_stored", "shared expert, reduced each time", IDLE, {"reduce_each": True}),
        ("gpt_oss", 2, 4, 2, True, "memo_0.3", "biases, HSDP", IDLE, {"replicate": 2}),
        ("mixtral", 4, 4, 4, True, "segments_2", "one expert a rank", IDLE, {}),
        ("dots1", 2, 2, 4, True, "chunks_5", "a capacity", static(4, 1, 1), {"capacity": 0.7}),
    )
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


@pytest.mark.parametrize("row", ROWS)
def test_gradients_do_not_depend_on_the_order_of_chunks(pool: RankPool, row: str) -> None:
    case, plan = ROWS[row]
    check_parity(pool, case, [plan])


def test_gradients_are_the_same_in_an_order_that_the_solver_gives(pool: RankPool) -> None:
    """Exchanges longer than products: the first chunk's weight gradients are made before the second chunk's rows are worked on."""
    solved = _choose(0.1, 0.05, False, False, False, (1, 2, 4)).order
    assert solved.backward.defers_weights and solved.backward != in_order(solved.backward.degree, defers_weights=True)
    case = {"family": "qwen3_moe", "ep": 2, "expert_order": solved, "policy": "recompute"}
    check_parity(pool, case, [plan_of(2, batch((0, 2, 2, ALL[:2])), batch((1, 1, 1, ALL[2:])))])
