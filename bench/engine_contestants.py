"""Contestants of bench/engines.py that are DeepSpeed's: our step under ZeRO-3, and Hugging Face's model driven by DeepSpeed plainly."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from ..memory.policy import MemoryPolicy
from ..model.build import build_on_meta, install
from ..parallel.sequence.kernels import block_kernel
from ..parallel.sharding.config import Backend, EngineConfig
from ..parallel.sharding.deepspeed import load_deepspeed
from ..parallel.sharding.deepspeed_settings import LAST_STEP
from ..parallel.sharding.parts import write_shard
from ..parallel.topology import Topology
from ..training.micro_batches import count_targets, read_step
from ..training.objectives.heads import LanguageModelling
from ..training.optimizers.build_zero import shard
from ..training.optimizers.config import OptimConfig
from ..training.step import backward_step
from ..training.step_setup import StepSetup
from .contestants import DEVICE, Documents, Workload, attention_by_document, packed_row, static_plan

RATE = 1e-4


class OursZero:
    """The package's own step under DeepSpeed's ZeRO-3; each rank is its own sequence group."""

    def __init__(self, workload: Workload, policy: MemoryPolicy, topology: Topology, weights: Mapping[str, Tensor]) -> None:
        self._topology, self.model = topology, build_on_meta(workload.config(), torch.float32)
        install(self.model, policy, loss_chunk_tokens=workload.loss_chunk_tokens)
        engine = EngineConfig(name="deepspeed", backend=Backend.DEEPSPEED, stage=3)
        self._trained = shard(self.model, DEVICE, OptimConfig(name="bench", lr=RATE, grad_clip=None), engine, policy)
        for name, flat in self._trained.updater.weights.named_parameters():
            write_shard(flat, weights[name])
        rotary: Any = self.model.model
        rotary.rotary_emb.__init__(self.model.config)  # its tables are unset: it was made without memory
        self._trained.updater.weights_changed()
        self._setup = StepSetup(model=self.model, topology=topology, kernel=block_kernel(DEVICE), device=DEVICE, reduce_each=True)
        documents = workload.documents(topology.world_size)
        self._source: Any = Documents(documents)
        self._plan = static_plan(topology.world_size, tuple(map(len, documents)), len(workload.lengths), 1)

    def step(self) -> float:
        updater = self._trained.updater
        works = read_step(self._source, 0, self._plan, self._topology.rank)
        count = count_targets(works, self._topology, DEVICE)
        updater.start(RATE, lambda: None)
        shares = backward_step(self._setup, works, LanguageModelling(count, DEVICE), on_last=updater.before_final_backward)
        updater.finish()
        updater.apply()
        return float(shares.sum())

    def tensors(self) -> Iterator[Tensor]:
        weights: Any = self._trained.weights
        return _held(self.model, weights._engine.optimizer)


class PlainZero:
    """A plain loop around the stock model under DeepSpeed's ZeRO-3 as its own tutorials have it: packed row, attention by document."""

    def __init__(self, workload: Workload, topology: Topology, weights: Mapping[str, Tensor], *, checkpointing: bool) -> None:
        deepspeed = load_deepspeed(DEVICE)
        AttentionInterface.register("efflaunch_bench_varlen", attention_by_document)
        model = AutoModelForCausalLM.from_config(workload.config(), attn_implementation="efflaunch_bench_varlen").train()
        model.load_state_dict(dict(weights), strict=False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": LAST_STEP,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 3},
        }
        with redirect_stdout(io.StringIO()):
            optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        per_rank, rank = len(workload.lengths), topology.rank
        self._batch = packed_row(workload.documents(topology.world_size)[rank * per_rank : (rank + 1) * per_rank], varlen=True)
        self._world, self._count = topology.world_size, topology.world_size * sum(length - 1 for length in workload.lengths)

    def step(self) -> float:
        # ZeRO-3 averages gradients over ranks, hence the factor.
        loss = self._engine(**self._batch, use_cache=False, num_items_in_batch=self._count).loss * self._world
        self._engine.backward(loss)
        self._engine.step()
        return float(loss.detach()) / self._world

    def tensors(self) -> Iterator[Tensor]:
        return _held(self._engine.module, self._engine.optimizer)


def _held(model: torch.nn.Module, optimizer: Any) -> Iterator[Tensor]:
    """What a rank holds of ZeRO-3 between steps: parts of weights, float32 weights, states, and the buffers of gradients."""
    for parameter in model.parameters():
        inner: Any = parameter
        yield inner.ds_tensor
        yield parameter
    yield from optimizer.fp32_partitioned_groups_flat
    for state in optimizer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    yield from (value for value in vars(optimizer).values() if isinstance(value, Tensor))
