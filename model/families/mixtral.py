"""Mixtral: Llama's attention, a mixture of experts whose weights stay in float32."""

from __future__ import annotations

from .llama import LlamaAttention
from .mixture import MixtureHalf


class MixtralLayer(MixtureHalf, LlamaAttention):
    """Softmax routing, always renormalised."""

    projections = LlamaAttention.projections
    own = {"mlp.gate": "MixtralTopKRouter", "mlp.experts": "MixtralExperts"}  # noqa: RUF012
    wide_weights = True

    def _window(self) -> int | None:
        # Its attention module keeps none; its forward asks the config, and so do masks.
        return getattr(self.attention.config, "sliding_window", None)


LAYER = MixtralLayer
