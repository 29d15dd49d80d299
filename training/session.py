"""Builds everything one rank needs before its first step, once, in an order every rank shares."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ..checkpoint.engine import CheckpointEngine, SaveReport
from ..checkpoint.mirror import MirrorReport
from ..checkpoint.replica.replicas import ReplicaReport
from ..cluster.config import ClusterConfig, Device
from ..estimate.attention_case import attention_case
from ..estimate.determinism import said_of_order
from ..estimate.ledger import Ledger
from ..estimate.plan_inputs import PlanInputs
from ..estimate.stages import gpipe_in_flight
from ..estimate.timing.bandwidth import offload_link
from ..memory.offload.checks import check_offload_space
from ..memory.offload.host_store import HostStore
from ..memory.offload.open import open_store
from ..memory.position import Position
from ..model.adapters.base import adapter_identity, model_digest
from ..model.spec import ModelSpec, active_layer_parameters, model_spec
from ..parallel.config import GradReduce
from ..parallel.layout import Layout, solve_layout
from ..parallel.pipeline.place import StagePlace
from ..parallel.sequence.attention import BlockKernel
from ..parallel.sequence.kernel_choice import KernelChoice
from ..parallel.sequence.kernels import kernel_for
from ..parallel.topology import Topology, whole_world
from ..utils.c_allocator import return_freed_blocks
from ..utils.orderly_end import closed_in_order
from ..utils.text import typed
from .agreed_ledger import agreed_ledger
from .agreed_order import take_planned_order
from .bind_cores import bind_to_gpu
from .data.identity import data_identity, settings_of
from .data.source import DataSource, open_data
from .data.train_stages import train_stages
from .deterministic import compute_in_order
from .engines import builder_of
from .make_groups import make_groups
from .oom import memory_errors_named
from .optimizers.build import Trained
from .optimizers.config import Update
from .optimizers.room import check_update_memory
from .optimizers.updater import Updater
from .proven_model import prove_model
from .run_settings import RunSettings
from .step_setup import StepSetup

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """One rank's live objects."""

    topology: Topology
    device: torch.device
    layout: Layout
    ledger: Ledger
    spec: ModelSpec
    source: DataSource
    data: dict[str, Any]
    """What the data is (data.identity), as checkpoints keep it."""
    trained: Trained
    """The model, its weights and updater, as the engine built them."""
    adapter: dict[str, Any] | None
    """What the adapters are a part of (model.adapters.base), as checkpoints keep it; None: all weights are trained."""
    checkpointer: CheckpointEngine
    step_setup: StepSetup
    """Settings that all steps have in common."""
    store: HostStore | None
    """Memory for the activations that the policy moves off the device; None: none."""

    @property
    def model(self) -> PreTrainedModel:
        """The trained model; weights and names are Hugging Face's."""
        return self.trained.model

    @property
    def updater(self) -> Updater:
        """The updater, which owns the optimizer."""
        return self.trained.updater

    @property
    def kernel(self) -> BlockKernel:
        """The attention kernel of one block on this device."""
        return self.step_setup.kernel

    @property
    def linear_cost_tokens(self) -> float:
        """Tokens of attention span whose cost equals the layer's token-local work: 2 P / (2 H D) per token and layer."""
        return active_layer_parameters(self.spec) / self.spec.query_size


@contextmanager
def joined_ranks(cluster: ClusterConfig, timeout_s: float) -> Iterator[torch.device]:
    """Start the default process group from the agent's environment, and yield this rank's device; `timeout_s`: of its collectives.

    The group is destroyed at an orderly end only: NCCL waits there for what was begun, and so for ranks that wait for this one.
    """
    device = _join_ranks(cluster, timedelta(seconds=timeout_s))
    with closed_in_order(dist.destroy_process_group):
        yield device


def _join_ranks(cluster: ClusterConfig, timeout: timedelta) -> torch.device:
    if cluster.device is Device.CPU:
        if not return_freed_blocks():
            log.warning("this C library keeps freed blocks: resident memory may pass the memory certificate")
        dist.init_process_group("gloo", timeout=timeout)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["RANK"]) % cluster.ranks_per_node)
    torch.cuda.set_device(device)
    # First: threads of the process group have the cores of the one that starts them.
    bind_to_gpu(device, cluster.ranks_per_node)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    return device


def build_session(
    config: RunSettings,
    run_dir: Path,
    device: torch.device,
    on_save: Callable[[SaveReport], None],
    on_replica: Callable[[ReplicaReport], None] | None = None,
    on_mirror: Callable[[MirrorReport], None] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Session:
    """Build a rank's objects: data first, whose errors come soonest; layout, communicators, model, checkpoints. Collective.

    `on_progress` is called with the name of each phase.
    """
    spec = model_spec(config.model)
    stages = train_stages(config.train, config.data)
    source = open_data(config.data, config.train.seed, spec.vocab_size, config.train.objective, stages, config.train.learn)
    data = data_identity(source.corpora, settings_of(config.data, config.train.seed, stages, config.train.learn), source.fingerprint())
    layout = solve_layout(
        config.parallel, config.cluster, spec, max_seq_len=config.data.max_seq_len, global_batch_tokens=config.data.global_batch_tokens
    )
    kernel, choice = rank_kernel(config, layout, device)
    # First, so that communicators take their memory before the model does. The ledger assumes how much: it asks a GPU for its total.
    topology = make_groups(config, layout, device)
    ledger = agreed_ledger(config, device, run_dir)
    if topology.rank == 0:
        _log_notes(config, ledger, choice)
    prove_model(config.model, run_dir, on_progress)
    check_update_memory(ledger.on_host)
    store = host_store(ledger, device)
    with memory_errors_named(ledger, Position("building the model"), device, step=lambda: 0, resume=typed("resume", run_dir)):
        build, policy = builder_of(config), ledger.inputs.policy
        place, experts = stage_place(topology, ledger), topology.experts
        trained = build(config, policy, topology.mesh, device, store, on_progress=on_progress, expert_mesh=experts, place=place)
    take_planned_order(trained.model, ledger.inputs, topology)
    adapter = agreed_adapter(config, topology)
    checkpointer = CheckpointEngine(
        config.checkpoint,
        run_dir / "checkpoints",
        state=trained.state,
        metadata=_metadata(config, trained.model, layout, source, data, adapter),
        on_save=on_save,
        on_replica=on_replica,
        on_mirror=on_mirror,
    )
    return Session(
        topology=topology,
        device=device,
        layout=layout,
        ledger=ledger,
        spec=spec,
        source=source,
        data=data,
        trained=trained,
        adapter=adapter,
        checkpointer=checkpointer,
        step_setup=step_setup(trained.model, topology, ledger.inputs, device, kernel),
        store=store,
    )


def _log_notes(config: RunSettings, ledger: Ledger, choice: KernelChoice) -> None:
    """What a run's log is to say of the plan, once."""
    order = said_of_order(ledger.inputs, choice)
    if order is not None:
        log.info("%s", order)
    if config.optim.update is Update.BACKWARD and config.checkpoint.every_steps is not None:
        log.info("optim.update=backward: checkpoints are copied behind forward passes alone, backward already changes weights")


def rank_kernel(config: RunSettings, layout: Layout, device: torch.device) -> tuple[BlockKernel, KernelChoice]:
    """The attention kernel of this rank, said by rank 0; ConfigError where none that is installed can do what the configuration asks.

    With train.deterministic everything this process computes from here on adds in one order.
    """
    train = config.train
    compute_in_order(deterministic=train.deterministic)
    case = attention_case(
        model_spec(config.model), layout, dtype=train.dtype.value, max_seq_len=config.data.max_seq_len, deterministic=train.deterministic
    )
    kernel, choice = kernel_for(config.parallel.attention_kernel, case, device)
    if device.type == "cuda" and dist.get_rank(whole_world()) == 0:
        log.info("attention kernel: %s", choice)
    return kernel, choice


def stage_place(topology: Topology, ledger: Ledger) -> StagePlace | None:
    """This rank's stage of the ledger's; None where there is one."""
    if topology.pipeline is None:
        return None
    return StagePlace(ledger.stages[topology.stage_index].layers, topology.stage_index, topology.pipeline)


def step_setup(model: PreTrainedModel, topology: Topology, inputs: PlanInputs, device: torch.device, kernel: BlockKernel) -> StepSetup:
    """The setup of the rank's steps by the ledger's own inputs, in which nothing is left open."""
    parallel = inputs.parallel
    return StepSetup(
        model=model,
        topology=topology,
        kernel=kernel,
        device=device,
        reduce_each=parallel.grad_reduce is not GradReduce.STEP,
        barrier_free=parallel.barrier_free,
        order=parallel.pipeline.order,
        gpipe_in_flight=gpipe_in_flight(inputs),
    )


def close_store(session: Session) -> None:
    """Give back host memory, or files. Waits for copies, which may follow a collective: for orderly ends alone."""
    if session.store is not None:
        session.store.close()


def host_store(ledger: Ledger, device: torch.device) -> HostStore | None:
    """Allocate host memory for what the policy moves, before step 1; ConfigError on every rank of a node with too little."""
    inputs = ledger.inputs
    if not inputs.policy.uses_host:
        return None
    capacity, directory = ledger.arena_bytes, inputs.policy.offload_dir
    check_offload_space(capacity, inputs.layout.ranks_per_node, directory)
    # Nobody takes memory before everybody has looked.
    dist.barrier(group=whole_world())
    # A disk that is slower than the estimate, and with it the solver, take it to be is named.
    expected = None if directory is None else offload_link(inputs).out
    return open_store(device=device, capacity_bytes=capacity, offload_dir=directory, expected_write_bytes_per_s=expected)


def plain_config(config: RunSettings) -> dict[str, Any]:
    """The configuration as JSON, for checkpoints and for sinks that show it."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=lambda value: value.value))  # type: ignore[call-overload]
    return plain


def agreed_adapter(config: RunSettings, topology: Topology) -> dict[str, Any] | None:
    """What a checkpoint says in place of the frozen weights: rank 0 reads their files for all. Collective over all ranks."""
    if not config.adapter.is_trained:
        return None
    mine = model_digest(config.model, config.train.seed, config.train.dtype) if topology.rank == 0 else ""
    payload = [mine]
    dist.broadcast_object_list(payload, 0, group=topology.world, device=torch.device("cpu"))
    return adapter_identity(config.adapter, payload[0], model_spec(config.model))


def _metadata(
    config: RunSettings,
    model: PreTrainedModel,
    layout: Layout,
    source: DataSource,
    data: dict[str, Any],
    adapter: dict[str, Any] | None,
) -> dict[str, Any]:
    """The metadata of a checkpoint."""
    return {
        "hf_config": model.config.to_dict(),
        "layout": str(layout),
        "seed": config.train.seed,
        "config": plain_config(config),
        "data": data,
        "tokenizer": source.tokenizer,
        "adapter": adapter,
    }
