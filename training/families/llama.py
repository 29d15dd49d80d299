"""Llama and the families that share its layer: norm, attention, residual, norm, MLP, residual."""

from __future__ import annotations

from torch import Tensor
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

    def _project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, M) -> (T, heads, D) for each projection."""
        heads = self.spec.num_heads, self.spec.num_kv_heads, self.spec.num_kv_heads
        projections = self.attention.q_proj, self.attention.k_proj, self.attention.v_proj
        q, k, v = (project(h).unflatten(-1, (count, self.spec.head_dim)) for project, count in zip(projections, heads, strict=True))
        return q, k, v


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
