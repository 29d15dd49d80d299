"""Ranks that would take chunks in other orders end before their first step, all of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from efflaunch.errors import PlanError
from efflaunch.parallel.experts.layer_order import PLAIN, LayerOrder, in_order
from efflaunch.parallel.topology import whole_world
from efflaunch.tests.estimate.test_expert_order import inputs
from efflaunch.tests.ranks import RankPool
from efflaunch.training import agreed_order as module
from efflaunch.training.agreed_order import agreed_order, take_planned_order


def agree(backward: list[int]) -> str:
    """On a rank: what is agreed on, or why not."""
    order = LayerOrder(in_order(1), in_order(backward[dist.get_rank()]))
    try:
        return agreed_order(order, whole_world()).digest
    except PlanError as error:
        return str(error)


def test_one_order_on_all_ranks_or_none() -> None:
    with RankPool() as pool:
        assert pool.run(agree, [1, 1], ranks=2) == [PLAIN.digest] * 2
        first, second = pool.run(agree, [1, 2], ranks=2)
    assert first == second and "another one than rank 0's on rank 1" in first and "parallel.experts.degree=1" in first


@pytest.mark.parametrize("shared", [True, False])
def test_layers_take_the_plans_order_where_ranks_share_experts(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "agreed_order", lambda order, world: order)
    taken: list[LayerOrder] = []
    layers = [SimpleNamespace(forward=SimpleNamespace(use_expert_order=taken.append))] * 2
    model: Any = SimpleNamespace(model=SimpleNamespace(layers=layers))
    topology: Any = SimpleNamespace(shares_experts=shared, world=None)
    take_planned_order(model, inputs(degree=2), topology)
    assert [order.forward.degree for order in taken] == [2, 2] * shared
