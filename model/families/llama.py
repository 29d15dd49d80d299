"""Llama and the families that share its layer: norm, attention, residual, norm, MLP, residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...memory.heads import HeadIndex
from .adapter import LayerAdapter


class LlamaLayer(LayerAdapter):
    """Llama 2 and 3, with or without biases."""

    def input_norm(self, x: Tensor) -> Tensor:
        return self.layer.input_layernorm(x)  # type: ignore[no-any-return,operator]

    def query(self, h: Tensor, heads: HeadIndex, graph: bool) -> Tensor:
        return self.project(self.attention.q_proj, h, heads, graph)  # type: ignore[arg-type]

    def key_value(self, h: Tensor, heads: HeadIndex, graph: bool) -> tuple[Tensor, Tensor]:
        k, v = (self.project(module, h, heads, graph) for module in (self.attention.k_proj, self.attention.v_proj))  # type: ignore[arg-type]
        return k, v

    def residual(self, x: Tensor, o: Tensor, graph: bool = False) -> Tensor:
        return x + linear(self.attention.o_proj, o.flatten(1), graph)  # type: ignore[arg-type]

    def mlp_in(self, x: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        mlp, h = self.layer.mlp, self.layer.post_attention_layernorm(x)  # type: ignore[operator]
        return linear(mlp.gate_proj, h, graph), linear(mlp.up_proj, h, graph)  # type: ignore[arg-type,union-attr]

    def mlp_out(self, x: Tensor, gate: Tensor, up: Tensor, graph: bool = False) -> Tensor:
        mlp = self.layer.mlp
        return x + linear(mlp.down_proj, mlp.act_fn(gate) * up, graph)  # type: ignore[arg-type,union-attr,operator]

    def project(self, module: nn.Linear, h: Tensor, heads: HeadIndex, graph: bool) -> Tensor:
        """(T, M) -> (T, heads, D) of the heads asked for."""
        return linear(module, h, graph, self._rows(heads)).unflatten(-1, (-1, self.spec.head_dim))

    def _rows(self, heads: HeadIndex) -> slice | Tensor | None:
        """Rows of a projection's weight that make these heads."""
        if heads is None:
            return None
        size, count = self.spec.head_dim, len(heads)
        if heads == tuple(range(heads[0], heads[0] + count)):
            return slice(heads[0] * size, (heads[0] + count) * size)
        return (torch.tensor(heads).unsqueeze(1) * size + torch.arange(size)).flatten()


def linear(module: nn.Linear, x: Tensor, graph: bool = False, rows: slice | Tensor | None = None) -> Tensor:
    """x W^T + b of the weight's `rows` (None: all). `graph`: values may be anything, only gradients are wanted."""
    weight, bias = module.weight, module.bias
    if rows is None and not graph:
        return module(x)  # type: ignore[no-any-return]
    if rows is not None:
        rows = rows.to(weight.device) if isinstance(rows, Tensor) else rows
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return LinearGraph.apply(x, weight, bias) if graph else F.linear(x, weight, bias)  # type: ignore[no-any-return]


class LinearGraph(torch.autograd.Function):
    """The backward of x W^T + b for x (T, I), W (M, I), b (M,) or None; forward returns no values, and takes no memory.

    Where the product's gradient needs not the product (it goes into a sum, a rotation, or was stored), a third of a
    recomputation's matrix products need not be made.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(x.shape[0], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return dy @ weight if needs_x else None, dy.T @ x if needs_weight else None, dy.sum(0) if needs_bias else None


class MistralLayer(LlamaLayer):
    """Mistral: the same window in every layer, kept in the config."""

    def _window(self) -> int | None:
        return getattr(self.attention.config, "sliding_window", None)


class Qwen2Layer(LlamaLayer):
    """Qwen2: biases on q, k, v; a window in the layers that have one."""


class HeadNormLayer(LlamaLayer):
    """Queries and keys are normalised per head before rotation, so their gradients need the projections' values."""

    def query(self, h: Tensor, heads: HeadIndex, graph: bool) -> Tensor:
        return self.attention.q_norm(super().query(h, heads, False))  # type: ignore[no-any-return,operator]

    def key_value(self, h: Tensor, heads: HeadIndex, graph: bool) -> tuple[Tensor, Tensor]:
        k = self.project(self.attention.k_proj, h, heads, False)  # type: ignore[arg-type]
        return self.attention.k_norm(k), self.project(self.attention.v_proj, h, heads, graph)  # type: ignore[arg-type,operator]


class Qwen3Layer(HeadNormLayer):
    """Qwen3: Llama's layer with norms per head."""
