"""SmolLM3: Llama's layer, some of them without rotation."""

from __future__ import annotations

from torch import nn

from .llama import LlamaLayer
from .rope import UNROTATED


class SmolLM3Layer(LlamaLayer):
    """A layer without rotation reads a table that turns nothing: its steps are those of the others, and share their graphs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        if not self.attention.use_rope:
            self.rope_key = UNROTATED


LAYER = SmolLM3Layer
