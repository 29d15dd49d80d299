"""What is a decoder layer of this family?

Adapters that cut a Hugging Face layer into token-local steps, one for each family, chosen by the Hugging Face model type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from .adapter import LayerAdapter


def layer_adapter(layer: nn.Module, model_type: str) -> LayerAdapter:
    """The adapter of one decoder layer; ConfigError names the file to write for a family that has none."""
    from .gemma import Gemma2Layer, Gemma3Layer
    from .llama import LlamaLayer, MistralLayer, Qwen2Layer, Qwen3Layer

    adapters: dict[str, type[LayerAdapter]] = {
        "llama": LlamaLayer,
        "mistral": MistralLayer,
        "qwen2": Qwen2Layer,
        "qwen3": Qwen3Layer,
        "gemma2": Gemma2Layer,
        "gemma3_text": Gemma3Layer,
    }
    if model_type not in adapters:
        raise ConfigError(
            "model",
            found=f"model type {model_type!r}",
            expected=f"one of {', '.join(adapters)}",
            hint=f"an adapter in model/families/{model_type}.py with the steps of adapter.py, as llama.py has",
        )
    return adapters[model_type](layer)
