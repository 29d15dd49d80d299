"""Experts as a node of autograd's graph: frozen weights get no gradient, and the others those of the formulas."""

from __future__ import annotations

import torch

from efflaunch.memory.executor.experts import Routing
from efflaunch.memory.executor.experts_graph import in_graph
from efflaunch.tests.memory.test_expert_chunks import EXPERTS, experts_of, tokens_of


def test_a_node_has_the_gradients_of_the_formulas() -> None:
    experts = experts_of(slice(None), bias=True)
    experts.down.weight.requires_grad_(False)
    h, weights, dy = tokens_of(0, 3)
    routing = Routing.of(torch.tensor([[0, 5], [7, 2], [2, 5]], dtype=torch.int32), EXPERTS)
    leaf = h.clone().requires_grad_()
    y = in_graph(experts, leaf, weights, routing)
    y.backward(dy)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        gate_up = experts.gate_and_up(routing.at_experts(h), routing)
    d_h, _, parameters = experts.gradients(routing.hold(h), gate_up, weights, dy, routing)
    assert torch.equal(y, experts.output(gate_up, weights, routing)) and torch.equal(leaf.grad, d_h)
    for weight, expected in zip(experts.weights, parameters, strict=True):
        assert weight.grad is None if expected is None else torch.equal(weight.grad, expected)
    assert experts.down.weight.grad is None
