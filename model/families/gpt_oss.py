"""gpt-oss: Llama's attention with sinks; the best K logits of a router with a bias, and experts with biases and a clamped activation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...memory.executor.experts import Experts
from ...memory.executor.grouped import GroupedProjection
from .llama import LlamaAttention
from .mixture import MixtureHalf


class GptOssLayer(MixtureHalf, LlamaAttention):
    """Softmax over the chosen experts only; fused weights are (E, inputs, outputs), gate and up in turns."""

    projections = LlamaAttention.projections
    own = {"mlp.router": "GptOssTopKRouter", "mlp.experts": "GptOssExperts"}  # noqa: RUF012
    router = "mlp.router"
    sinks_name = "self_attn.sinks"

    def choose(self, logits: Tensor) -> Tensor:
        """Experts of each token (T, K): the largest logits."""
        return logits.topk(self.per_token, dim=-1).indices

    def weigh(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Weights of the chosen experts (T, K), in the precision of the logits."""
        return logits.gather(1, chosen.long()).softmax(-1)

    def experts(self) -> Experts:
        """The experts with their weights as they are now."""
        gate_up, down = (
            GroupedProjection(self.weight(f"mlp.experts.{name}_proj"), self.weight(f"mlp.experts.{name}_proj_bias"), transposed=True)
            for name in ("gate_up", "down")
        )
        return Experts(gate_up, down, self.activate)

    def activate(self, gate_up: Tensor) -> Tensor:
        """Gate and up in turns (R, 2 I) to the inputs of the down projection (R, I)."""
        own: Any = self.layer.get_submodule("mlp.experts")
        gate, up = gate_up[:, ::2].clamp(max=own.limit), gate_up[:, 1::2].clamp(min=-own.limit, max=own.limit)
        product: Tensor = (up + 1) * (gate * (gate * own.alpha).sigmoid())
        return product


LAYER = GptOssLayer
