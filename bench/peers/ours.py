"""Our executor under one policy, on one process without a process group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import yaml

from ...launcher.schema import load
from ...memory.config import MemoryConfig, Walk, check_memory
from ...memory.offload.arena import HostArena
from ...memory.offload.device import PlainDevice
from ...memory.offload.open import IN_FLIGHT_BYTES
from ...memory.offload.store import ArenaStore, HostStore
from ...memory.policy import MOVED, MemoryPolicy, explicit_policy
from ...training.model import install
from .document import alone, one_document
from .host import HostMemory
from .shape import Task
from .stock import Contestant, stock_model, token_ids

CONF = Path(__file__).parent.parent.parent / "conf" / "memory"


def preset(name: str, chunk_tokens: int) -> MemoryPolicy:
    """The policy of conf/memory/NAME.yaml, its chunks (where it has any) of `chunk_tokens`."""
    memory = load(MemoryConfig, yaml.safe_load((CONF / f"{name}.yaml").read_text()), "memory")
    check_memory(memory)
    policy = explicit_policy(memory)
    return policy if policy.chunk_tokens is None else replace(policy, chunk_tokens=chunk_tokens)


def auto_policies(chunk_tokens: int) -> tuple[MemoryPolicy, MemoryPolicy]:
    """What is solved for a full device, and for one that has room."""
    return MemoryPolicy(layer_input=MOVED, attention=Walk.CHUNKS, chunk_tokens=chunk_tokens), MemoryPolicy(graph=True)


class Ours(Contestant):
    """What the policy moves goes through the real store, in an arena of plain memory."""

    def __init__(self, task: Task, policy: MemoryPolicy) -> None:
        self.model, self.host = stock_model(task), HostMemory()
        self._store = _store(task) if policy.uses_host else None
        install(self.model, policy, loss_chunk_tokens=task.chunks.loss, store=self._store)
        self._tokens = one_document(token_ids(task)[0])
        self._attention = alone(task.num_tokens, torch.device("cpu"))

    def step(self) -> float:
        loss = self.model(self._tokens, self._attention, 1.0 / (len(self._tokens.token_ids) - 1))
        loss.backward()
        return float(loss.detach())

    def is_host(self, address: int) -> bool:
        return self._store is not None and self._store.owns(address)

    def host_peak_bytes(self) -> int:
        return 0 if self._store is None else self._store.stats.high_water_bytes


def _store(task: Task) -> HostStore:
    """An arena for everything a layer makes, of blocks so small that ends of blocks do not show in its high water."""
    wide = 4 if task.dtype == "float32" else 2
    everything = task.num_tokens * task.num_layers * task.shape.hidden_size * 16 * wide
    return ArenaStore(HostArena(everything, block_bytes=64), PlainDevice(), IN_FLIGHT_BYTES)
