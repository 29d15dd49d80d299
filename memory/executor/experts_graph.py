"""Experts as one node of autograd's graph, for policies that keep the graph of a layer's halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .expert_chunks import BackwardInChunks, ForwardInChunks
from .experts import Experts, Routing


class ExpertsGraph(torch.autograd.Function):
    """Experts as one node of a graph, which keeps rows, gate and up: h (T, M), weights (T, K), routing, experts, parameters -> (T, M)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weights: Tensor, routing: Routing, experts: Experts, *parameters: Tensor) -> Tensor:
        ctx.routing, ctx.experts = routing, experts
        if routing.order is not None:
            passed = ForwardInChunks(experts, h, routing, hold=True)
            passed.run()
            ctx.save_for_backward(passed.held, passed.gate_up, weights)
            return passed.output(weights)
        held = routing.hold(h)
        gate_up = experts.gate_and_up(routing.rows(held), routing)
        ctx.save_for_backward(held, gate_up, weights)
        return experts.output(gate_up, weights, routing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        held, gate_up, weights = ctx.saved_tensors
        if ctx.routing.order is None:
            d_h, d_weights, of_parameters = ctx.experts.gradients(held, gate_up, weights, dy, ctx.routing)
        else:
            passed = BackwardInChunks(ctx.experts, weights, dy, ctx.routing, h=None, held=held, gate_up=gate_up)
            passed.run()
            d_h, d_weights, of_parameters = passed.result()
        return d_h, d_weights, None, None, *of_parameters


def in_graph(experts: Experts, h: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """`ExpertsGraph` of these experts."""
    parameters: Sequence[Tensor] = experts.weights
    return ExpertsGraph.apply(h, weights, routing, experts, *parameters)  # type: ignore[no-any-return]
