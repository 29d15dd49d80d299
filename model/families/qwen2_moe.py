"""Qwen2-MoE: Qwen2's attention, a mixture of experts with a shared one, or a dense feed-forward as Qwen2's."""

from __future__ import annotations

from .llama import LlamaAttention, LlamaLayer
from .mixture import SharedMixtureHalf


class Qwen2MoeLayer(SharedMixtureHalf, LlamaAttention):
    """Biases on queries, keys and values; softmax routing, renormalised where the config has it."""

    projections = (*LlamaAttention.projections, *SharedMixtureHalf.projections)
    own = {"mlp.gate": "Qwen2MoeTopKRouter", "mlp.experts": "Qwen2MoeExperts"}  # noqa: RUF012


LAYER = Qwen2MoeLayer
DENSE = LlamaLayer
