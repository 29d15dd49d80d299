"""Qwen2: Llama's layer; biases on q, k, v and the window of the layers that have one are read from its modules."""

from __future__ import annotations

from .llama import LlamaLayer

LAYER = LlamaLayer
