"""Builds a model and its updater from a configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from ...checkpoint.state import State
from ...memory.executor.compiled_graph import check_compiler
from ...memory.offload.host_store import HostStore
from ...memory.policy import MemoryPolicy
from ...model.adapters.config import AdapterConfig
from ...model.adapters.magnitudes import initialise_magnitudes
from ...model.adapters.names import is_trained
from ...model.adapters.peft_files import load_adapter
from ...model.build import RouterSettings, build_config, build_empty, initialise, master_dtype
from ...model.config import ModelConfig
from ...model.hf_fields import hf_config_dict
from ...model.load_plan import EMBEDDING
from ...model.stage import Stage, stage_of
from ...model.weights import load_weights
from ...parallel.config import ParallelConfig
from ...parallel.pipeline.place import StagePlace
from ...parallel.sharding.config import EngineConfig
from ...parallel.sharding.engine import Weights
from ...parallel.sharding.fsdp2 import Fsdp2State
from ..config import TrainConfig
from .adamw import build_optimizer
from .config import OptimConfig, StateDevice, Update
from .device import BackwardUpdater, StepUpdater
from .host import HostUpdater
from .masters import host_weights
from .norm import NormScope
from .updater import Updater

log = logging.getLogger(__name__)


class Settings(Protocol):
    """The part of the configuration that is read here."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def adapter(self) -> AdapterConfig: ...
    @property
    def engine(self) -> EngineConfig: ...


@dataclass(frozen=True)
class Trained:
    """A configuration's model, the holder of its weights, its updater, and the state that checkpoints hold."""

    model: PreTrainedModel
    weights: Weights
    updater: Updater
    state: State


class BuildTrained(Protocol):
    """Builds a configuration's model as one engine does: `build_trained` is FSDP2's. Collective over the mesh."""

    def __call__(
        self,
        config: Settings,
        policy: MemoryPolicy,
        mesh: DeviceMesh,
        device: torch.device,
        store: HostStore | None = None,
        *,
        load: bool = True,
        on_progress: Callable[[str], None] | None = None,
        expert_mesh: DeviceMesh | None = None,
        place: StagePlace | None = None,
    ) -> Trained: ...


def build_trained(
    config: Settings,
    policy: MemoryPolicy,
    mesh: DeviceMesh,
    device: torch.device,
    store: HostStore | None = None,
    *,
    load: bool = True,
    on_progress: Callable[[str], None] | None = None,
    expert_mesh: DeviceMesh | None = None,
    place: StagePlace | None = None,
) -> Trained:
    """The model sharded by FSDP2, with its first weights (random by seed, or `model.path`), and its updater. Collective over the mesh.

    `store` takes what `policy` moves to the host. `load`: read `model.path`, where given.
    `on_progress` is called tensor by tensor: it may take long. `expert_mesh` and `place` as in `build_empty`.
    """
    if policy.compile == "inductor":
        check_compiler(device)
    compute, on_host = getattr(torch, config.train.dtype.value), config.optim.state_device is StateDevice.HOST
    model = build_empty(
        build_config(hf_config_dict(config.model)),
        policy,
        mesh,
        device=device,
        compute_dtype=compute,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        z_loss=config.train.z_loss,
        store=store,
        host_weights=on_host,
        expert_mesh=expert_mesh,
        routers=router_settings(config.train),
        place=place,
        adapter=config.adapter,
    )
    weights: nn.Module = host_weights(model, master_dtype(compute)) if on_host else model
    initialise(model, config.train.seed, weights, on_progress)
    if load and config.model.path is not None:
        groups = [*mesh.get_all_groups(), *((place.ranks.column,) if place is not None else ())]
        load_weights(weights, config.model, config.train.seed, on_progress, groups, stage_of(model).shapes, compute)
    initialise_magnitudes(model, weights)
    if load and config.adapter.init is not None:
        load_adapter(weights, config.adapter, config.model, config.train.seed, config.train.dtype)
    updater = build_updater(model, weights, config.optim, device, b_lr_ratio=config.adapter.b_lr_ratio)
    frozen = [name for name, _ in model.named_parameters() if not is_trained(name, config.adapter)]
    return Trained(model, stage_of(model).weights, updater, Fsdp2State(weights, updater.optimizer, frozen))


def router_settings(train: TrainConfig) -> RouterSettings:
    """What the configuration asks of routers."""
    return RouterSettings(train.router_balance, train.router_z_loss, train.router_bias_rate, train.expert_capacity)


def build_updater(
    model: nn.Module, weights: nn.Module, config: OptimConfig, device: torch.device, *, b_lr_ratio: float = 1.0
) -> Updater:
    """The updater of a sharded `model`. `weights`: the model itself, or its host weights where states live on the host.

    Call once the weights are filled: the model gets them. `b_lr_ratio` as in `build_optimizer`.
    """
    optimizer = build_optimizer(model, config, weights, b_lr_ratio=b_lr_ratio)
    scope = norm_scope(model, weights)
    if config.state_device is StateDevice.HOST:
        updater = HostUpdater(model, weights, optimizer, config, device, scope)
        updater.weights_changed()
        log.info("optim.state_device=host: weights are updated on %d threads (launcher.threads_per_rank)", torch.get_num_threads())
        return updater
    return (BackwardUpdater if config.update is Update.BACKWARD else StepUpdater)(model, optimizer, config, scope)


def norm_scope(model: nn.Module, weights: nn.Module) -> NormScope:
    """What the norm of this rank's gradients is a part of: the whole model's, where `model` is a stage of several."""
    stage = model.forward
    if not isinstance(stage, Stage) or stage.links is None:
        return NormScope()
    place = stage.links.place
    repeated = [each for name, each in weights.named_parameters() if name == EMBEDDING and not place.has_embedding]
    return NormScope(place.ranks.column, frozenset(repeated))
