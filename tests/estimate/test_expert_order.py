"""Which order a run's experts are taken in: never slower in the model than every exchange by itself, as asked where it is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from efflaunch.bench.predicted import QWEN2_MOE
from efflaunch.cluster.config import Device
from efflaunch.estimate.footprint.live_mixture import mixture_backward, mixture_forward
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.estimate.timing.expert_order import AS_THEY_COME, _choose, expert_order, way_s
from efflaunch.estimate.timing.step import experts_exchange_s
from efflaunch.parallel.config import ExpertsConfig
from efflaunch.tests.memory.settings import SMALL, cluster, make_ledger


def inputs(ep: int = 4, degree: int | None = None, tokens: int = 65536, **machine: Any) -> PlanInputs:
    made = make_ledger({**SMALL, **QWEN2_MOE}, length=tokens, tokens_per_rank=tokens, machines=cluster(**machine)).inputs
    return made.with_parts(parallel=replace(made.parallel, experts=ExpertsConfig(ep=ep, degree=degree)))


def test_one_way_by_hand() -> None:
    shape = inputs()
    # Four rows of 256 numbers in bfloat16, 1.5 times as many on the busiest rank, three quarters of them to other ranks.
    assert shape.spec.experts is not None and shape.spec.experts.per_token == 4
    assert way_s(shape) == pytest.approx(4 * 256 * 2 * 1.5 * 3 / 4 / 450e9)
    assert way_s(inputs(ranks_per_node=2, num_nodes=4)) == pytest.approx(4 * 256 * 2 * 1.5 * (1 / 4 / 450e9 + 2 / 4 / 50e9))
    assert way_s(inputs(ep=1)) == 0.0


def test_nothing_is_cut_where_nothing_can_be_hidden() -> None:
    assert expert_order(inputs(ep=1)) is AS_THEY_COME
    assert expert_order(inputs(device=Device.CPU)) is AS_THEY_COME and AS_THEY_COME.exposed == 1.0


@pytest.mark.parametrize("tokens", [256, 65536, 1 << 20])
@pytest.mark.parametrize("slower", [1, 30])
def test_the_chosen_order_is_never_slower_than_exchanges_by_themselves(tokens: int, slower: int) -> None:
    chosen = expert_order(inputs(tokens=tokens, intra_node_bandwidth=450e9 / slower))
    assert chosen.compute_s < chosen.seconds <= chosen.plain_s * (1 + 1e-9) and 0.0 <= chosen.exposed <= 1.0 + 1e-9
    if tokens == 256:  # every start costs more than what it could hide
        assert chosen.order.forward.degree == 1


def test_where_exchanges_are_long_they_are_hidden_and_the_plan_counts_what_is_left() -> None:
    shape = inputs(tokens=1 << 20)
    chosen = expert_order(shape)
    assert chosen.order.forward.degree > 1 and chosen.exposed < 0.9
    once = inputs(tokens=1 << 20, degree=1)
    ratio = experts_exchange_s(shape) / experts_exchange_s(once)
    assert ratio == pytest.approx(chosen.exposed / expert_order(once).exposed) and ratio < 1


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_a_degree_that_is_asked_for_is_that_of_both_passes(degree: int) -> None:
    for device in Device:
        order = expert_order(inputs(degree=degree, device=device)).order
        assert order.forward.degree == order.backward.degree == degree


def test_chunks_take_no_less_memory_than_one_exchange() -> None:
    shape, plain = inputs(degree=4), inputs(device=Device.CPU)
    experts = shape.spec.experts
    assert experts is not None and not expert_order(shape).order.is_plain
    assert mixture_forward(shape, experts) >= mixture_forward(plain, experts)
    with_chunks = mixture_backward(shape, experts, 0, 0)
    assert with_chunks[1:] == mixture_backward(plain, experts, 0, 0) and with_chunks[0].piece > 0
    # Beside the sums, what the kernel makes of a chunk's gate and up; where chunks cut experts, sums are in float32.
    one, here = with_chunks[-1].fixed / 3, experts.num_experts // shape.expert_parallel
    assert here == 2 and mixture_backward(inputs(degree=2), experts, 0, 0)[0].fixed == pytest.approx((3 + 2 / 2) * one)
    assert with_chunks[0].fixed > 6 * one


@pytest.mark.parametrize("ep", [2, 4, 8])
def test_chunks_that_are_chosen_are_whole_experts(ep: int) -> None:
    shape = inputs(ep=ep, tokens=1 << 20, intra_node_bandwidth=30e9)
    assert shape.spec.experts is not None
    order = expert_order(shape).order
    assert order.slots(shape.spec.experts.num_experts // ep) == 1 and not order.is_plain


def test_a_degree_that_is_slower_than_plain_costs_what_it_costs_and_is_shown_as_hiding_nothing() -> None:
    slow = _choose(1e-6, 1e-6, False, False, False, (12,))
    assert slow.seconds > slow.plain_s and slow.exposed > 1.0 and slow.hidden_share == 0.0
    shape, once = inputs(tokens=256, degree=12), inputs(tokens=256, degree=1)
    assert experts_exchange_s(shape) > experts_exchange_s(once)
