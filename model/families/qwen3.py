"""Qwen3: Llama's layer with norms per head."""

from __future__ import annotations

from .llama import HeadNormLayer

LAYER = HeadNormLayer
