"""A layer that keeps autograd's own graph of both halves: nothing is recomputed, everything is remembered.

Note: mirrored in estimate/footprint/live_layer.py (graph_moments) and estimate/footprint/activations.py (graph_row).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_pass import AttentionRuntime
from .sinks import sinks_backward, sinks_of
from .token_local import GradientSums, LayerSteps, Rope


class Halves:
    """The graphs of both halves of one layer, and what attention's backward needs; each is freed before the next is used."""

    __slots__ = ("adapter", "attention", "gathered", "lse", "o", "o_leaf", "projected", "x_after", "x_before", "y")

    def __init__(self, adapter: LayerSteps, x: Tensor, rope: Rope, attention: AttentionRuntime) -> None:
        self.adapter, self.attention = adapter, attention
        with torch.enable_grad():
            self.x_before = x.detach().requires_grad_()
            self.projected = adapter.before_attention(self.x_before, rope)
        with torch.no_grad():
            q, k, v = (t.detach() for t in self.projected)
            self.gathered = attention.exchange_in(q, k, v, adapter.spec)
            self.o, self.lse = attention.core_forward(self.gathered, adapter.spec, sinks_of(adapter))
            o = attention.exchange_out(self.o, adapter.spec)
        with torch.enable_grad():
            self.x_after, self.o_leaf = x.detach().requires_grad_(), o.detach().requires_grad_()
            self.y: Tensor | None = adapter.after_attention(self.x_after, self.o_leaf)

    def backward(self, dy: Tensor, sums: GradientSums) -> Tensor:
        """dx; parameters' gradients go to `sums`."""
        assert self.y is not None
        spec = self.adapter.spec
        dx_after, do = sums.grad(self.y, [self.x_after, self.o_leaf], dy)
        self.y = None
        do = self.attention.exchange_out_backward(do, spec)
        sinks_backward(self.adapter, self.attention, do, self.o, self.lse, sums)
        wide = self.attention.core_backward(do, self.gathered, self.o, self.lse, spec)
        dqkv = self.attention.exchange_in_backward(wide, spec, self.projected[0].dtype)
        del do, wide
        return sums.grad(self.projected, [self.x_before], dqkv)[0].add_(dx_after)
