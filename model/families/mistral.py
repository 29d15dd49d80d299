"""Mistral: Llama's layer with the same window in every layer, kept in the config."""

from __future__ import annotations

from .llama import LlamaLayer


class MistralLayer(LlamaLayer):
    """The window is not in the attention module."""

    def _window(self) -> int | None:
        return getattr(self.attention.config, "sliding_window", None)


LAYER = MistralLayer
