"""Builds a model that DeepSpeed's ZeRO holds, and its updater, from a configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from ...memory.offload.host_store import HostStore
from ...memory.policy import MemoryPolicy
from ...model.build import build_config, build_on_meta, initialise, install, master_dtype
from ...model.hf_fields import hf_config_dict
from ...model.stage import stage_of
from ...model.weights import load_weights
from ...parallel.pipeline.place import StagePlace
from ...parallel.sharding.config import EngineConfig
from ...parallel.sharding.deepspeed import Zero, ZeroWeights, shard_by_zero
from ...parallel.sharding.deepspeed_settings import ZeroSettings
from ...parallel.sharding.deepspeed_state import ZeroState, flat_weights, places
from .build import Settings, Trained, router_settings
from .config import OptimConfig
from .zero import ZeroUpdater, zero_optimizer


def build_zero(
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
    """The model in the parts of engine.stage, with its first weights, as `build_trained` has them, and its updater. Collective.

    Weights are made, or read, in float32 where ZeRO keeps them, each rank its own part.
    """
    assert expert_mesh is None and place is None, "refused where it is configured"
    model = empty_model(config, policy, store)
    trained = shard(model, device, config.optim, config.engine, policy)
    initialise(model, config.train.seed, trained.updater.weights, on_progress)
    if load and config.model.path is not None:
        shapes = stage_of(model).shapes
        load_weights(trained.updater.weights, config.model, config.train.seed, on_progress, mesh.get_all_groups(), shapes)
    trained.updater.weights_changed()
    return trained


def empty_model(config: Settings, policy: MemoryPolicy, store: HostStore | None) -> PreTrainedModel:
    """The model on the meta device, our forwards in it, parameters in the precision of computation."""
    compute = getattr(torch, config.train.dtype.value)
    model = build_on_meta(build_config(hf_config_dict(config.model)), master_dtype(compute))
    routers, chunk = router_settings(config.train), config.train.loss_chunk_tokens
    install(model, policy, loss_chunk_tokens=chunk, z_loss=config.train.z_loss, store=store, routers=routers)
    # Parameters only: buffers keep the precision Hugging Face made them in.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(compute)
    return model


def shard(model: PreTrainedModel, device: torch.device, optim: OptimConfig, engine: EngineConfig, policy: MemoryPolicy) -> Trained:
    """The model of `empty_model` in ZeRO's hands: weights unset, `weights_changed` to be called once they are. Collective."""
    assert engine.stage is not None, "refused where it is configured"
    layers = list(model.model.layers)
    settings = ZeroSettings(
        stage=engine.stage,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        grad_clip=optim.grad_clip,
        layer_numbers=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        largest_numbers=max(parameter.numel() for parameter in model.parameters()),
        on_gpu=device.type == "cuda",
        # Weights that a segment asks for while they are on their way would be taken for whole.
        gathers_ahead=policy.graph or policy.segment_layers == 1,
        asked=engine.zero,
    )
    zero: Zero = shard_by_zero(model, layers, device, settings, zero_optimizer(model, optim))
    stage_of(model).weights = weights = ZeroWeights(zero)
    found = places(zero)
    stage_of(model).router_losses.factor = weights.factor
    masters = flat_weights(model, found)
    return Trained(model, weights, ZeroUpdater(zero, masters), ZeroState(zero, masters, found))
