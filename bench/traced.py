"""Compares what the ledger says a configuration's step takes with what a traced step of it takes.

Shared by `python -m efflaunch.bench.predicted` and tests/memory. The tracer counts every storage of one warm step on rank 0:
weights, states, gradients, gathered copies, activations and buffers, as on a GPU: rows that wait on the host do not count, the
buffers they come back into do. What it cannot see (the process, communicators, kernels' scratch) is left out of the prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from ..cluster.config import ClusterConfig, Device
from ..estimate.build import build_ledger
from ..estimate.footprint.device import UNSEEN, device_terms
from ..estimate.footprint.host import arena_bytes
from ..estimate.footprint.term import Phase
from ..estimate.ledger import Ledger
from ..estimate.plan_inputs import PlanInputs
from ..memory.config import ActivationPlace, AttentionTiling, MemoryConfig
from ..model.adapters.config import NO_ADAPTER, AdapterConfig
from ..model.config import Family, ModelConfig
from ..model.hf_fields import hf_config_dict
from ..model.spec import model_spec
from ..parallel.config import GradReduce, ParallelConfig, Scheme
from ..training.config import Dtype, TrainConfig
from ..training.data.config import DataConfig

GIB = 1 << 30
MODEL: dict[str, Any] = {
    "name": "small",
    "family": Family.LLAMA,
    "num_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_heads": 8,
    "num_kv_heads": 2,
    "vocab_size": 2048,
    "max_positions": 65536,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of `micro_batches` documents, each of `tokens` tokens a rank over `ranks` ranks."""

    name: str
    tokens: int = 1024
    ranks: int = 1
    micro_batches: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to MODEL."""
    memory: MemoryConfig
    dtype: str = "float32"
    scheme: str = "auto"
    grad_reduce: str = "micro_batch"
    loss_chunk: int = 256
    documents: int = 1
    """Number of documents in each sequence, of equal length: attention is block-diagonal over them."""
    adapter: AdapterConfig = NO_ADAPTER

    @property
    def length(self) -> int:
        return self.tokens * self.ranks


def memory_config(**fields: Any) -> MemoryConfig:
    """`recompute` with changes; places and walks by their names."""
    given: dict[str, Any] = {"layer_input": "keep", "attention_output": "recompute", "activations": "recompute", **fields}
    for key in ("layer_input", "attention_output", "activations"):
        given[key] = ActivationPlace(given[key])
    if given.get("attention") is not None:
        given["attention"] = AttentionTiling(given["attention"])
    return MemoryConfig(name="case", **given)


def case_ledger(case: Case) -> Ledger:
    """The ledger of a CPU machine with room for all of it."""
    cluster = ClusterConfig(
        name="bench", device=Device.CPU, num_nodes=1, ranks_per_node=case.ranks, device_memory_bytes=64 * GIB, host_memory_bytes=512 * GIB,
        peak_flops=1e11, gemm_efficiency=0.5, attention_efficiency=0.5, intra_node_bandwidth=1e9, inter_node_bandwidth=1e9,
        host_link_bandwidth=1e9,
    )  # fmt: skip
    ledger = build_ledger(
        PlanInputs.make(
            spec=model_spec(ModelConfig(**{**MODEL, **case.model})),
            parallel=ParallelConfig(
                name="bench", tokens_per_rank=case.tokens, scheme=Scheme(case.scheme), grad_reduce=GradReduce(case.grad_reduce)
            ),
            memory=case.memory,
            train=TrainConfig(steps=1, dtype=Dtype(case.dtype), loss_chunk_tokens=case.loss_chunk),
            data=DataConfig(name="bench", max_seq_len=case.length, global_batch_tokens=case.length * case.micro_batches),
            cluster=cluster,
            adapter=case.adapter,
        )
    )
    assert ledger.layout.num_micro_batches == case.micro_batches and ledger.layout.sp_degree == case.ranks, case
    return ledger


def predicted_by_phase(case: Case) -> dict[Phase, int]:
    """Bytes of each phase that a tracer sees."""
    packed = min(1.0, 2 / case.documents) if case.documents > 1 else 0.0
    seen = [entry for entry in device_terms(replace(case_ledger(case).inputs, packed=packed)) if entry.name not in UNSEEN]
    return {phase: sum(entry.by_phase.get(phase, 0) for entry in seen) for phase in Phase}


def build_case(case: Case) -> Any:
    """Build (step, tensors, store) on a rank: runs one step; lists weights and states; takes what the policy moves. Collective."""
    import numpy as np
    import torch

    from ..memory.offload.open import open_store
    from ..model.build import build_config, build_model
    from ..parallel.sequence.attention import CpuKernel
    from ..parallel.sequence.plan import Group, MicroBatch, StepPlan
    from ..parallel.topology import build_topology
    from ..training.micro_batches import read_step
    from ..training.objectives.heads import LanguageModelling
    from ..training.optimizers.adamw import build_optimizer
    from ..training.optimizers.config import OptimConfig
    from ..training.step import backward_step
    from ..training.step_setup import StepSetup

    torch.set_num_threads(1)
    ledger = case_ledger(case)
    topology, device = build_topology(replicate=1, device="cpu"), torch.device("cpu")
    store = open_store(device=device, capacity_bytes=arena_bytes(ledger.inputs)) if ledger.inputs.policy.uses_host else None
    model = build_model(
        build_config(hf_config_dict(ModelConfig(**{**MODEL, **case.model}))), ledger.inputs.policy, topology.mesh,
        device=device, compute_dtype=getattr(torch, case.dtype), seed=0, loss_chunk_tokens=case.loss_chunk, store=store,
        adapter=case.adapter,
    )  # fmt: skip
    optimizer = build_optimizer(model, OptimConfig(name="adamw", lr=1e-4))
    count, group = case.micro_batches, ledger.layout
    batches = tuple(MicroBatch((Group(0, case.ranks, group.ulysses, (index,)),)) for index in range(count))
    plan = StepPlan(case.ranks, (case.length,) * count, batches)
    ids = np.random.default_rng(0).integers(0, ledger.inputs.spec.vocab_size, case.length)

    def step() -> None:
        works = read_step(_Source(plan.lengths, ids, case.documents), 0, plan, topology.rank)  # type: ignore[arg-type]
        each = ledger.inputs.parallel.grad_reduce is not GradReduce.STEP
        setup = StepSetup(model=model, topology=topology, kernel=CpuKernel(), device=device, reduce_each=each)
        backward_step(setup, works, LanguageModelling(case.length * count, device))
        optimizer.step()
        optimizer.zero_grad()

    def tensors() -> list[Any]:
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        return [*model.parameters(), *states]

    return step, tensors, store


@dataclass(frozen=True)
class _Source:
    """Documents of one step that are all the same."""

    all_lengths: tuple[int, ...]
    ids: Any
    documents: int

    def lengths(self, step: int) -> tuple[int, ...]:
        return self.all_lengths

    def parts(self, step: int, index: int) -> tuple[int, ...]:
        length, count = self.all_lengths[index], self.documents
        return tuple(length * (i + 1) // count - length * i // count for i in range(count))

    def tokens(self, step: int, index: int, start: int, stop: int) -> Any:
        return self.ids[start:stop], self.ids[start:stop]


def traced_peak(case: Case) -> int:
    """Trace the second step on a rank and return its peak live bytes. Collective."""
    from ..memory.arena.tracer import StorageTracer

    step, tensors, store = build_case(case)
    step()
    with StorageTracer(tensors(), host=None if store is None else store.owns) as tracer:
        step()
    if store is not None:
        store.close()
    return tracer.peak_bytes


def profiled_peak(case: Case) -> int:
    """Peak live bytes of the second step by the CPU allocator's count, which sees compiled graphs where no tracer looks. Collective.

    Scratch of kernels is in it too. Rows that wait on the host are not: their arena is there before the step.
    """
    from torch.profiler import ProfilerActivity, profile

    step, tensors, store = build_case(case)
    step()
    storages = {storage.data_ptr(): storage.nbytes() for tensor in tensors() for storage in _storages(tensor)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = sorted((event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    if store is not None:
        store.close()
    return sum(storages.values()) + int(max(accumulate(size for _, size in events)))


def _storages(tensor: Any) -> list[Any]:
    from ..parallel.sharding.parts import local

    return [local(tensor).untyped_storage()]
