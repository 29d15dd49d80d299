"""dots.llm1: Qwen3's attention, experts chosen by sigmoid scores with a correction bias; the first layers dense as Qwen3's."""

from __future__ import annotations

from .llama import HeadNormAttention, HeadNormLayer
from .sigmoid_mixture import SigmoidMixtureHalf


class Dots1Layer(SigmoidMixtureHalf, HeadNormAttention):
    """Norms per head; DeepSeek-V3's router, experts and shared expert."""

    projections = (*HeadNormAttention.projections, *SigmoidMixtureHalf.projections)
    own = {"mlp.gate": "Dots1TopkRouter", "mlp.experts": "Dots1Experts"}  # noqa: RUF012


LAYER = Dots1Layer
DENSE = HeadNormLayer
