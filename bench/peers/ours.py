"""Our executor under one policy, on one process without a process group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ...cluster.config import ClusterConfig
from ...estimate.build import build_ledger
from ...estimate.plan_inputs import PlanInputs
from ...launcher.config.schema import load
from ...memory.config import MemoryConfig, check_memory
from ...memory.offload.device import PlainDevice
from ...memory.offload.host_pool import HostArena
from ...memory.offload.host_store import ArenaStore, HostStore
from ...memory.offload.open import IN_FLIGHT_BYTES
from ...memory.policy import MemoryPolicy, explicit_policy
from ...model.build import install
from ...model.config import Family, ModelConfig
from ...model.spec import model_spec
from ...parallel.config import ParallelConfig
from ...training.config import Dtype, TrainConfig
from ...training.data.config import DataConfig
from ..slopes import LONGEST
from .document import alone, mean_loss
from .host import HostMemory
from .shape import Task
from .stock import Contestant, stock_model, token_ids

CONF = Path(__file__).parent.parent.parent / "conf"
GIB = 1 << 30


def preset(name: str) -> MemoryPolicy:
    """The policy of conf/memory/NAME.yaml."""
    memory = _load(MemoryConfig, f"memory/{name}")
    check_memory(memory)
    return explicit_policy(memory)


def with_chunks(policy: MemoryPolicy, chunk_tokens: int) -> MemoryPolicy:
    """Return the policy with chunks (where it has any) of `chunk_tokens`."""
    return policy if policy.chunk_tokens is None else replace(policy, chunk_tokens=chunk_tokens)


def auto_policies(task: Task) -> dict[str, MemoryPolicy]:
    """Return the policies that memory=auto is solved to, by name.

    auto: for Llama-3-8B and LONGEST tokens on eight 80 GB GPUs, where everything is full; auto_with_room: for `task` itself on this
    kind of machine with memory to spare.
    """
    full = _load(ClusterConfig, "cluster/h100_80g_8")
    roomy = replace(_load(ClusterConfig, "cluster/local_cpu"), ranks_per_node=1, device_memory_bytes=64 * GIB, host_memory_bytes=256 * GIB)
    small = ModelConfig(
        name="bench",
        family=Family.LLAMA,
        num_layers=task.num_layers,
        hidden_size=task.shape.hidden_size,
        intermediate_size=task.shape.hidden_size * 7 // 2,
        num_heads=task.shape.num_heads,
        num_kv_heads=task.shape.num_heads // 4,
        vocab_size=task.shape.vocab_size,
        max_positions=131072,
    )
    return {
        "auto": _solved(_load(ModelConfig, "model/llama3_8b"), full, LONGEST),
        "auto_with_room": _solved(small, roomy, task.num_tokens, dtype=Dtype.FLOAT32),
    }


def _solved(model: ModelConfig, cluster: ClusterConfig, num_tokens: int, dtype: Dtype = Dtype.BFLOAT16) -> MemoryPolicy:
    ledger = build_ledger(
        PlanInputs.make(
            spec=model_spec(model),
            parallel=ParallelConfig(name="bench", tokens_per_rank=num_tokens // cluster.ranks_per_node),
            memory=_load(MemoryConfig, "memory/auto"),
            train=TrainConfig(steps=1, dtype=dtype),
            data=DataConfig(name="bench", max_seq_len=num_tokens, global_batch_tokens=num_tokens),
            cluster=cluster,
        )
    )
    if not ledger.fits:
        raise RuntimeError(f"{num_tokens} tokens of {model.name} do not fit {cluster.name}")
    return ledger.inputs.policy


def _load(kind: type, file: str) -> Any:
    return load(kind, yaml.safe_load((CONF / f"{file}.yaml").read_text()), file)


class Ours(Contestant):
    """Our executor: what the policy moves goes through the real store, in an arena of plain memory."""

    def __init__(self, task: Task, policy: MemoryPolicy) -> None:
        self.model, self.host = stock_model(task), HostMemory()
        self._store = store_of(task) if policy.uses_host else None
        install(self.model, policy, loss_chunk_tokens=task.chunks.loss, store=self._store)
        self._ids = token_ids(task)[0]
        self._attention = alone(task.num_tokens, torch.device("cpu"))

    def step(self) -> float:
        loss = mean_loss(self.model, self._ids, self._attention)
        loss.backward()
        return float(loss.detach())

    def is_host(self, address: int) -> bool:
        return self._store is not None and self._store.owns(address)

    def host_peak_bytes(self) -> int:
        return 0 if self._store is None else self._store.stats.high_water_bytes


def store_of(task: Task) -> HostStore:
    """An arena for everything a layer makes, of blocks so small that ends of blocks do not show in its high water."""
    wide = 4 if task.dtype == "float32" else 2
    everything = task.num_tokens * task.num_layers * task.shape.hidden_size * 16 * wide
    return ArenaStore(HostArena(everything, block_bytes=64), PlainDevice(), IN_FLIGHT_BYTES)
