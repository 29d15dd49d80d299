"""Volumes and seconds of operators against sums by hand, and which links a group uses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.experts.cost import (
    CALIBRATED,
    AlphaBeta,
    Collective,
    ExpertLayer,
    GradientCost,
    Groups,
    Operator,
    OperatorCost,
    Placement,
    ProcessGroup,
    Rates,
    Resource,
    WeightGradients,
    layer_cost,
    volumes,
)

LAYER = ExpertLayer(batch=2, tokens=8, hidden=4, ffn=16, heads=2, capacity=1.5, top_k=2, products=3, element_bytes=2)
NODE = ProcessGroup(4, 4)
GROUPS = Groups(experts=ProcessGroup(3, 1), shards=NODE, attention=NODE, gradients=ProcessGroup(3, 1))
RATES = Rates(
    name="a small machine",
    collectives={
        (Collective.ALL_TO_ALL, Resource.INTER): AlphaBeta(1.0, 0.5),
        (Collective.ALL_GATHER, Resource.INTRA): AlphaBeta(2.0, 0.25),
        (Collective.REDUCE_SCATTER, Resource.INTRA): AlphaBeta(3.0, 0.125),
        (Collective.ALL_REDUCE, Resource.INTER): AlphaBeta(4.0, 0.0625),
    },
    product=AlphaBeta(0.1, 0.001),
    attention=AlphaBeta(0.4, 0.002),
    score_s=0.003,
    gate_s=0.5,
    inverse_order_s=0.25,
    source="made up",
)


def row(rows: tuple[OperatorCost, ...], operator: Operator) -> OperatorCost:
    (found,) = [one for one in rows if one.operator is operator]
    return found


def test_volumes_by_hand() -> None:
    size = volumes(LAYER, GROUPS)
    routed = 2 * 1.5 * 16 * 4
    assert size.gather_bytes == routed * 2 and size.dispatch_bytes == routed / 4 * 2
    assert size.expert_macs == routed * 16 * 3 / 4
    assert size.attention_bytes == 16 * 4 * 2
    assert size.projection_macs == 4 * 16 * 16 / 4 and size.attention_macs == 2 * 2 * 64 * 4 / 4 and size.scores == 2 * 2 * 64 / 4
    assert size.gradient_elements == 4 * 16 // 4 + 2 * 4


def test_seconds_by_hand() -> None:
    cost = layer_cost(LAYER, GROUPS, RATES)
    size = volumes(LAYER, GROUPS)
    assert row(cost.forward, Operator.DISPATCH) == OperatorCost(Operator.DISPATCH, Resource.INTER, 1.0, 0.5 * size.dispatch_bytes)
    assert row(cost.forward, Operator.EXPERT_SCATTER) == OperatorCost(
        Operator.EXPERT_SCATTER, Resource.INTRA, 3.0, 0.125 * size.gather_bytes
    )
    assert row(cost.forward, Operator.EXPERTS).seconds(0.5) == pytest.approx(3 * 0.1 + 0.001 * size.expert_macs / 2)
    attention = row(cost.forward, Operator.ATTENTION).seconds(1.0)
    assert attention == pytest.approx(0.4 + 0.002 * (size.projection_macs + size.attention_macs) + 0.003 * size.scores)
    assert cost.gradient == GradientCost(Resource.INTER, 4.0, 0.0625 * 2, size.gradient_elements) and cost.max_parts == 2
    assert cost.gradient.seconds(10) == 4.0 + 1.25 and cost.gradient.seconds(0) == 0.0


@pytest.mark.parametrize("how", WeightGradients, ids=lambda how: how.name)
def test_deferring_weight_gradients_costs_neither_more_nor_less(how: WeightGradients) -> None:
    cost = layer_cost(LAYER, GROUPS, RATES)
    compute = [one for one in cost.backward[how] if one.resource is Resource.COMPUTE]
    twice = 2 * (row(cost.forward, Operator.EXPERTS).seconds(1.0) + row(cost.forward, Operator.ATTENTION).seconds(1.0))
    assert sum(one.seconds(1.0) for one in compute) == pytest.approx(twice + 2 * 0.25)
    kinds = {one.operator for one in compute}
    assert (Operator.EXPERT_WEIGHTS in kinds) == (how is not WeightGradients.FUSED)
    assert (Operator.ATTENTION_WEIGHTS in kinds) == (how is WeightGradients.ALL)


@pytest.mark.parametrize(
    ("group", "placement", "intra_share"),
    [
        (ProcessGroup(1, 1), Placement.NONE, 0.0),
        (ProcessGroup(4, 4), Placement.INTRA, 1.0),
        (ProcessGroup(4, 1), Placement.INTER, 0.0),
        (ProcessGroup(8, 4), Placement.BOTH, 3 / 7),
    ],
    ids=["one", "intra", "inter", "both"],
)
def test_placement(group: ProcessGroup, placement: Placement, intra_share: float) -> None:
    assert (group.placement, group.intra_share) == (placement, intra_share)


def test_a_group_that_does_not_divide_over_nodes_is_refused() -> None:
    with pytest.raises(PlanError, match="6 ranks, 4 of them in a node"):
        ProcessGroup(6, 4)


def test_an_all_to_all_over_both_links_is_two_tasks_side_by_side() -> None:
    """Experts over all ranks, no shards: of 7 others, 3 are in the node."""
    groups = replace(GROUPS, experts=ProcessGroup(8, 4), shards=ProcessGroup(1, 1))
    measured = {**RATES.collectives, (Collective.ALL_TO_ALL, Resource.INTRA): AlphaBeta(0.5, 0.01)}
    cost = layer_cost(LAYER, groups, replace(RATES, collectives=measured))
    sent = volumes(LAYER, groups).dispatch_bytes
    rows = [one for one in cost.forward if one.operator is Operator.COMBINE]
    assert [(one.resource, one.alpha_s) for one in rows] == [(Resource.INTRA, 0.5), (Resource.INTER, 1.0)]
    assert [one.work_s for one in rows] == pytest.approx([0.01 * sent * 3 / 7, 0.5 * sent * 4 / 7])
    assert not [one for one in cost.forward if one.operator in (Operator.EXPERT_GATHER, Operator.EXPERT_SCATTER)]


def test_a_collective_without_a_figure_is_named() -> None:
    with pytest.raises(PlanError, match=r"a small machine: found no all-to-all on intra-node links"):
        layer_cost(LAYER, replace(GROUPS, experts=ProcessGroup(8, 4)), RATES)


def test_one_rank_reduces_nothing_and_sends_nothing() -> None:
    alone = ProcessGroup(1, 1)
    cost = layer_cost(LAYER, Groups(experts=alone, shards=alone, attention=alone, gradients=alone), RATES)
    assert cost.gradient is None and {one.resource for one in cost.forward} == {Resource.COMPUTE}


def test_contention_rows() -> None:
    assert CALIBRATED.flat == (0.0, 0.05, 0.05, 0.0, 0.0, 0.4, 0.0, 0.4, 0.0)
