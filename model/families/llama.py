"""Llama's layer, which other families share: norm, attention, residual, norm, MLP, residual. Its attention alone is a class of its own."""

from __future__ import annotations

from torch import Tensor

from ...memory.executor.feed_forward import DenseFeedForward
from ...memory.executor.token_local import FeedForward, LayerSteps
from ...memory.heads import HeadIndex, head_runs
from .adapter import LayerAdapter
from .projection import Rows


class LlamaAttention(LayerAdapter):
    """The first half of a layer of Llama 2 and 3, with or without biases."""

    projections = tuple(f"self_attn.{name}_proj" for name in "qkvo")
    norms = ("input_layernorm", "post_attention_layernorm")

    def input_norm(self, x: Tensor) -> Tensor:
        return self.layer.input_layernorm(x)  # type: ignore[no-any-return,operator]

    def query(self, h: Tensor, heads: HeadIndex, graph: bool) -> Tensor:
        return self.project("self_attn.q_proj", h, heads, graph)

    def key_value(self, h: Tensor, heads: HeadIndex, graph: bool) -> tuple[Tensor, Tensor]:
        return self.project("self_attn.k_proj", h, heads, graph), self.project("self_attn.v_proj", h, heads, graph)

    def residual(self, x: Tensor, o: Tensor, graph: bool = False) -> Tensor:
        return x + self.projection("self_attn.o_proj")(o.flatten(1), graph=graph)

    def project(self, name: str, h: Tensor, heads: HeadIndex, graph: bool) -> Tensor:
        """Project (T, M) -> (T, heads, D) of the heads asked for, through the projection `name`."""
        return self.projection(name)(h, graph=graph, rows=self._rows(heads)).unflatten(-1, (-1, self.spec.head_dim))

    def _rows(self, heads: HeadIndex) -> Rows:
        """Rows of a projection's weight that make these heads."""
        if heads is None:
            return None
        size = self.spec.head_dim
        return tuple(slice(run.start * size, run.stop * size) for run in head_runs(heads))


class HeadNormAttention(LlamaAttention):
    """Queries and keys are normalised per head before rotation, so their gradients need the projections' values."""

    norms = (*LlamaAttention.norms, "self_attn.q_norm", "self_attn.k_norm")

    def query(self, h: Tensor, heads: HeadIndex, graph: bool) -> Tensor:
        return self.attention.q_norm(super().query(h, heads, False))  # type: ignore[no-any-return,operator]

    def key_value(self, h: Tensor, heads: HeadIndex, graph: bool) -> tuple[Tensor, Tensor]:
        k = self.project("self_attn.k_proj", h, heads, False)
        return self.attention.k_norm(k), self.project("self_attn.v_proj", h, heads, graph)  # type: ignore[operator]


class DenseHalf(LayerAdapter):
    """The second half of a layer of Llama 2 and 3: a dense feed-forward."""

    projections = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

    def feed_forward(self, steps: LayerSteps) -> FeedForward:
        """Implements `LayerAdapter.feed_forward` by `mlp_in` and `mlp_out`."""
        return DenseFeedForward(steps)

    def mlp_in(self, x: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        """Project rows to gate and up: (T, M) -> (T, I) each."""
        h = self.layer.post_attention_layernorm(x)  # type: ignore[operator]
        return self.projection("mlp.gate_proj")(h, graph=graph), self.projection("mlp.up_proj")(h, graph=graph)

    def mlp_out(self, x: Tensor, gate: Tensor, up: Tensor, graph: bool = False) -> Tensor:
        """Finish the layer: (T, M) and what mlp_in made of it -> the layer's output (T, M)."""
        # No name for the product: it would live through the sum, one more row of the feed-forward's width.
        down = self.projection("mlp.down_proj")
        return x + down(self.layer.mlp.act_fn(gate) * up, graph=graph)  # type: ignore[union-attr,operator]


class LlamaLayer(DenseHalf, LlamaAttention):
    """Llama 2 and 3."""

    projections = (*LlamaAttention.projections, *DenseHalf.projections)


class HeadNormLayer(DenseHalf, HeadNormAttention):
    """Llama's layer with norms per head."""

    projections = (*HeadNormAttention.projections, *DenseHalf.projections)


LAYER = LlamaLayer
