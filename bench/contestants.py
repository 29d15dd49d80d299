"""The step benchmark's contestants: our step, and plain Hugging Face + torch loops on the same weights and packed tokens.

Every contestant has `step() -> loss share of this rank` (forward, backward, fused AdamW) and `tensors()` (weights and states).
All shard with FSDP2 over the same mesh; each rank packs its own documents into one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..memory.policy import MemoryPolicy
from ..model.build import build_model
from ..parallel.sequence.kernels import block_kernel
from ..parallel.sequence.plan import Group, MicroBatch, StepPlan
from ..parallel.sharding.parts import write_shard
from ..parallel.topology import Topology
from ..training.micro_batches import count_targets, read_step
from ..training.objectives.heads import LanguageModelling
from ..training.step import backward_step
from ..training.step_setup import StepSetup

DEVICE = torch.device("cpu")
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Workload:
    """One step: the documents each rank packs, the model's Hugging Face fields, and tokens per chunk of our loss."""

    model: dict[str, Any]
    lengths: tuple[int, ...]
    """Token counts of one rank's documents; every rank has as many."""
    loss_chunk_tokens: int
    seed: int = 0

    def config(self) -> PretrainedConfig:
        fields = dict(self.model)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)

    def documents(self, world_size: int) -> list[np.ndarray]:
        """Token ids of all ranks' documents, rank by rank."""
        generator = np.random.default_rng(self.seed)
        return [
            generator.integers(0, self.model["vocab_size"], length, dtype=np.int64) for _ in range(world_size) for length in self.lengths
        ]


class Contestant(Protocol):
    def step(self) -> float: ...
    def tensors(self) -> Iterator[Tensor]: ...


def initial_weights(workload: Workload) -> dict[str, Tensor]:
    """Return weights that are the same on every rank."""
    torch.manual_seed(workload.seed)
    return {name: value.detach().clone() for name, value in AutoModelForCausalLM.from_config(workload.config()).named_parameters()}


def _targets(document: np.ndarray) -> np.ndarray:
    return np.concatenate([document[1:], [IGNORE]])


def _owned(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    yield from model.parameters()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


class Documents:
    """A DataSource of one step whose documents are in memory."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        self._documents = documents

    def lengths(self, step: int) -> tuple[int, ...]:
        return tuple(len(document) for document in self._documents)

    def parts(self, step: int, index: int) -> tuple[int, ...]:
        return (len(self._documents[index]),)

    def tokens(self, step: int, index: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self._documents[index][start:stop], _targets(self._documents[index])[start:stop]


class Ours:
    """The package's own step; each rank is its own sequence group unless `sp_degree` says otherwise."""

    def __init__(
        self, workload: Workload, policy: MemoryPolicy, topology: Topology, weights: Mapping[str, Tensor], *, sp_degree: int = 1
    ) -> None:
        self._topology = topology
        self.model = build_model(
            workload.config(),
            policy,
            topology.mesh,
            device=DEVICE,
            compute_dtype=torch.float32,
            seed=0,
            loss_chunk_tokens=workload.loss_chunk_tokens,
        )
        self._setup = StepSetup(model=self.model, topology=topology, kernel=block_kernel(DEVICE), device=DEVICE, reduce_each=False)
        for name, parameter in self.model.named_parameters():
            write_shard(parameter, weights[name])
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        documents = workload.documents(topology.world_size)
        self._source: Any = Documents(documents)
        self._plan = static_plan(topology.world_size, tuple(map(len, documents)), len(workload.lengths), sp_degree)

    def step(self) -> float:
        works = read_step(self._source, 0, self._plan, self._topology.rank)
        count = count_targets(works, self._topology, DEVICE)
        shares = backward_step(self._setup, works, LanguageModelling(count, DEVICE))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(shares.sum())

    def tensors(self) -> Iterator[Tensor]:
        return _owned(self.model, self._optimizer)


def static_plan(world_size: int, lengths: tuple[int, ...], per_rank: int, degree: int) -> StepPlan:
    groups = (
        Group(first, degree, degree, tuple(range(first * per_rank, (first + degree) * per_rank))) for first in range(0, world_size, degree)
    )
    return StepPlan(world_size, lengths, (MicroBatch(tuple(groups)),))


class Peer:
    """A plain loop around the stock model: packed row, `position_ids`, `use_cache=False`, FSDP2 per layer.

    `varlen`: attention document by document (the stronger peer) instead of stock SDPA with its dense packing mask.
    `checkpointing`: Hugging Face's gradient checkpointing of every layer.
    """

    def __init__(self, workload: Workload, topology: Topology, weights: Mapping[str, Tensor], *, varlen: bool, checkpointing: bool) -> None:
        AttentionInterface.register("efflaunch_bench_varlen", attention_by_document)
        attention = "efflaunch_bench_varlen" if varlen else "sdpa"
        self.model = AutoModelForCausalLM.from_config(workload.config(), attn_implementation=attention).train()
        self.model.load_state_dict(dict(weights), strict=False)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in (*self.model.model.layers, self.model):
            fully_shard(module, mesh=topology.mesh)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        per_rank = len(workload.lengths)
        documents = workload.documents(topology.world_size)[topology.rank * per_rank : (topology.rank + 1) * per_rank]
        self._batch = packed_row(documents, varlen)
        self._count = topology.world_size * sum(length - 1 for length in workload.lengths)
        self._world = topology.world_size

    def step(self) -> float:
        # FSDP2 averages gradients over ranks, hence the factor.
        loss = self.model(**self._batch, use_cache=False, num_items_in_batch=self._count).loss * self._world
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach()) / self._world

    def tensors(self) -> Iterator[Tensor]:
        return _owned(self.model, self._optimizer)


def packed_row(documents: list[np.ndarray], varlen: bool) -> dict[str, Any]:
    def row(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).unsqueeze(0)

    targets = row([_targets(document) for document in documents])
    batch: dict[str, Any] = {
        "input_ids": row(documents),
        "position_ids": row([np.arange(len(document)) for document in documents]),
        "labels": targets,
        "shift_labels": targets,
    }
    return batch | ({"document_lengths": [len(document) for document in documents]} if varlen else {})


def attention_by_document(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    document_lengths: list[int],
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal flash attention of each document by itself; query (1, H, T, D), key and value (1, K, T, D)."""
    parts = zip(*(t.split(document_lengths, 2) for t in (query, key, value)), strict=True)
    out = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in parts]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def global_loss(share: float) -> float:
    """The step's loss from every rank's share. Collective."""
    total = torch.tensor(share, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
