"""Peers that are Hugging Face alone: plain, gradient checkpointing, gradient checkpointing with its offload."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from .host import HostMemory, SaveOnHost
from .shape import Task


class Contestant:
    """One way to train the task's model on its sequence. `step` adds the gradients of the mean loss to `.grad`."""

    model: Any
    host: HostMemory

    def step(self) -> float:
        """The mean loss."""
        raise NotImplementedError

    def gradients(self) -> dict[str, Tensor]:
        """Return gradients of the mean over all targets after one step from none, under plain Hugging Face's names."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def tensors(self) -> Iterator[Tensor]:
        """Weights and their gradients, live throughout."""
        for p in self.model.parameters():
            yield p
            if p.grad is not None:
                yield p.grad

    def is_host(self, address: int) -> bool:
        """Return whether a storage at this address stands for host memory."""
        return self.host.owns(address)

    def host_peak_bytes(self) -> int:
        return self.host.peak_bytes

    def notes(self) -> str:
        """Describe what of this contestant is not the peer's own code, and why."""
        return ""


def stock_model(task: Task) -> Any:
    """The Hugging Face model with the task's weights; every call makes the same ones."""
    fields = task.shape.fields(task.num_layers)
    torch.manual_seed(task.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields), attn_implementation="sdpa")
    return model.to(getattr(torch, task.dtype)).train()


def token_ids(task: Task) -> Tensor:
    """(1, T)."""
    generator = torch.Generator().manual_seed(task.seed + 1)
    return torch.randint(0, task.shape.vocab_size, (1, task.num_tokens), generator=generator)


class Stock(Contestant):
    """`checkpointing`: every layer's input only, by Hugging Face's own switch; `offload`: those inputs on the host."""

    def __init__(self, task: Task, *, checkpointing: bool = False, offload: bool = False) -> None:
        self.model, self.host, self._ids = stock_model(task), HostMemory(), token_ids(task)
        if checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self._offload = offload
        if offload:
            self.model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=self._saved_on_host)

    def step(self) -> float:
        loss = self.model(input_ids=self._ids, labels=self._ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    def notes(self) -> str:
        if not self._offload:
            return ""
        return (
            "transformers' activation_checkpointing_enable(offload=True): its save_on_cpu hands CPU tensors back without a copy, so the "
            "same hooks run here with the device copy that a GPU makes"
        )

    def _saved_on_host(self, function: partial[Any], *arguments: Any) -> Any:
        with SaveOnHost(self.host):
            return checkpoint(function, *arguments, use_reentrant=False)
