"""Llama and the families that share its layer: norm, attention, residual, norm, MLP, residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .adapter import LayerAdapter, Rope


class LlamaLayer(LayerAdapter):
    """Llama 2 and 3, with or without biases."""

    def before_attention(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        h = self.layer.input_layernorm(x)
        q, k, v = self._project(h)
        q, k = apply_rotary_pos_emb(q, k, *rope, unsqueeze_dim=1)
        return q, k, v

    def after_attention(self, x: Tensor, o: Tensor) -> Tensor:
        x = x + self.attention.o_proj(o.flatten(1))
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x))

    def after_attention_graph(self, x: Tensor, o: Tensor) -> Tensor:
        mlp = self.layer.mlp
        x = x + self.attention.o_proj(o.flatten(1))
        h = self.layer.post_attention_layernorm(x)
        inner = mlp.act_fn(mlp.gate_proj(h)) * mlp.up_proj(h)
        # The layer ends in this product and a sum, whose gradients need neither's values: a third of the MLP is not recomputed.
        return x + LinearGraph.apply(inner, mlp.down_proj.weight, mlp.down_proj.bias)

    def _project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, M) -> (T, heads, D) for each projection."""
        heads = self.spec.num_heads, self.spec.num_kv_heads, self.spec.num_kv_heads
        projections = self.attention.q_proj, self.attention.k_proj, self.attention.v_proj
        q, k, v = (project(h).unflatten(-1, (count, self.spec.head_dim)) for project, count in zip(projections, heads, strict=True))
        return q, k, v


class LinearGraph(torch.autograd.Function):
    """The backward of x W^T + b for x (T, I), W (M, I), b (M,) or None; forward returns uninitialised memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty((x.shape[0], weight.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, needs_weight, needs_bias = ctx.needs_input_grad
        return dy @ weight, dy.T @ x if needs_weight else None, dy.sum(0) if needs_bias else None


class MistralLayer(LlamaLayer):
    """Mistral: the same window in every layer, kept in the config."""

    def _window(self) -> int | None:
        return getattr(self.attention.config, "sliding_window", None)


class Qwen2Layer(LlamaLayer):
    """Qwen2: biases on q, k, v; a window in the layers that have one."""


class Qwen3Layer(LlamaLayer):
    """Qwen3: q and k are normalised per head before rotation."""

    def _project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._project(h)
        return self.attention.q_norm(q), self.attention.k_norm(k), v
