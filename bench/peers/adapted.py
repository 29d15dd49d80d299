"""LoRA's contestants: peft on the stock model with gradient checkpointing, and our executor with adapters; the same factors in both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...memory.policy import MemoryPolicy
from ...model.adapters.config import AdapterConfig
from ...model.adapters.lora import insert_adapters
from ...model.adapters.names import FACTORS, PACKED, quantized_names
from ...model.adapters.quantized import QuantizedLinear, fill_levels, insert_quantized
from ...model.build import install
from .document import alone
from .host import HostMemory
from .ours import Ours, store_of
from .shape import Task
from .stock import Stock, stock_model, token_ids

ALPHA = 32.0


class PeftLora(Stock):
    """peft's LoRA on every matrix of the decoder layers, with Hugging Face's gradient checkpointing."""

    def __init__(self, task: Task, *, rank: int) -> None:
        super().__init__(task, checkpointing=True)
        from peft import LoraConfig, get_peft_model

        names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        wrapped: Any = get_peft_model(self.model, LoraConfig(r=rank, lora_alpha=int(ALPHA), target_modules=names, task_type="CAUSAL_LM"))
        self.model = wrapped.get_base_model()
        _fill_factors({_our_name(name): p for name, p in self.model.named_parameters() if p.requires_grad}, task.seed)

    def gradients(self) -> dict[str, Tensor]:
        """As the others', by our names."""
        return {_our_name(name): gradient for name, gradient in super().gradients().items()}


class Adapted(Ours):
    """Our executor with adapters under one policy; with adapter=qlora beside packed matrices."""

    def __init__(self, task: Task, policy: MemoryPolicy, *, adapter: AdapterConfig) -> None:
        self.model, self.host = stock_model(task), HostMemory()
        insert_adapters(self.model, adapter, getattr(torch, task.dtype))
        for layer in self.model.model.layers:
            _pack(layer, adapter, getattr(torch, task.dtype))
        self._store = store_of(task) if policy.uses_host else None
        install(self.model, policy, loss_chunk_tokens=task.chunks.loss, store=self._store)
        self._ids = token_ids(task)[0]
        self._attention = alone(task.num_tokens, torch.device("cpu"))
        _fill_factors({name: p for name, p in self.model.named_parameters() if p.requires_grad}, task.seed)


def _pack(layer: nn.Module, adapter: AdapterConfig, dtype: torch.dtype) -> None:
    """Pack a layer's own matrices."""
    there = dict(layer.named_modules())
    names = tuple(name for name in quantized_names(adapter) if name in there)
    plain: dict[str, Any] = {name: there[name] for name in names}
    insert_quantized(layer, names, dtype)
    fill_levels(layer)
    for name, linear in plain.items():
        module: Any = layer.get_submodule(name)
        assert isinstance(module, QuantizedLinear)
        module.fill_from(linear, {PACKED: module.get_parameter(PACKED)})


@torch.no_grad()
def _fill_factors(named: dict[str, Tensor], seed: int) -> None:
    """The same random numbers in factors of the same names, so that no gradient is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(named):
        named[name].copy_(0.1 * torch.randn(named[name].shape, generator=generator))


def _our_name(name: str) -> str:
    plain = name.replace(".base_layer.", ".")
    return plain.replace(".lora_A.default.weight", f".{FACTORS}.A").replace(".lora_B.default.weight", f".{FACTORS}.B")
