"""Hugging Face's gpt-oss with a dense feed-forward in place of its experts: attention sinks, biases, windows and YaRN by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from efflaunch.model.families.llama import LlamaLayer
from efflaunch.tests.parity.ranks_side import run_plans


class DenseConfig(GptOssConfig):
    model_type = "gpt_oss_dense"
    mlp_bias: bool = False


class Dense(LlamaMLP):
    """gpt-oss layers take router scores beside the output."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class DenseModel(GptOssForCausalLM):
    config_class = DenseConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Dense(config)


class SinkLayer(LlamaLayer):
    sinks_name = "self_attn.sinks"


def register() -> None:
    """Let transformers build it."""
    AutoConfig.register("gpt_oss_dense", DenseConfig, exist_ok=True)
    AutoModelForCausalLM.register(DenseConfig, DenseModel, exist_ok=True)


@contextmanager
def adapted() -> Iterator[None]:
    """Within, its layers have an adapter."""

    def layer_adapter(layer: nn.Module, model_type: str) -> SinkLayer:
        assert model_type == "gpt_oss_dense"
        return SinkLayer(layer)

    with mock.patch("efflaunch.model.build.layer_adapter", layer_adapter):
        yield


def run_adapted(*arguments: Any) -> Any:
    """`run_plans` of a case of this family."""
    with adapted():
        return run_plans(*arguments)
