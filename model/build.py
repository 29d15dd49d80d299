"""Builds the trained model: a Hugging Face model owns weights and names; its forward is ours.

Build order, each step once: on the meta device -> executors in place of layer forwards -> FSDP2 -> materialise shard by
shard (random, or read from safetensors). No rank ever holds more than one whole tensor beyond its shards.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..errors import ConfigError
from ..memory.executor.capacity import Capacity
from ..memory.executor.compiled_steps import Graphs
from ..memory.executor.layer import LayerExecutor
from ..memory.executor.mixture import ExpertLoad
from ..memory.executor.router_bias import RouterBiases
from ..memory.executor.router_losses import RouterLosses
from ..memory.executor.saved import HostStore
from ..memory.policy import MemoryPolicy
from ..memory.position import Position
from ..parallel.expert_exchange import ExpertRanks
from ..parallel.experts.layer_order import LayerOrder
from ..parallel.pipeline.links import StageLinks
from ..parallel.pipeline.place import StagePart, StagePlace
from ..parallel.sharding.experts import spread_experts
from ..parallel.sharding.fsdp2 import shard_model
from ..parallel.sharding.parts import memory_of, write_shard
from .adapters.config import NO_ADAPTER, AdapterConfig
from .adapters.lora import LoraFactors, insert_adapters
from .adapters.names import quantized_names
from .adapters.quantized import QuantizedLinear, fill_levels, insert_quantized, plain_shapes
from .chunked_loss import LossOptions
from .families import FACTS, family_of, layer_adapter
from .families.facts import READ_BY_ALL
from .stage import Stage, stage_of
from .weights import persistent_buffers


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What is asked of a model's routers beside what its config says."""

    balance: float = 0.0
    """Weight of the loss that evens the use of experts."""
    z_loss: float = 0.0
    """Weight of the loss of large logits."""
    bias_rate: float = 0.0
    """Step of the update of the biases by which experts are chosen."""
    capacity_factor: float | None = None
    """Rows that an expert takes of a document at most, over the mean; None: nothing is dropped."""


def position_of(model: PreTrainedModel) -> Position:
    """The position, for messages, of the rank that runs `model`."""
    return stage_of(model).position


def build_config(arguments: dict[str, Any]) -> PretrainedConfig:
    """The Hugging Face config of `hf_config_dict`'s arguments. ConfigError where transformers makes something else of them."""
    fields = copy.deepcopy(arguments)
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except StrictDataclassError as error:
        raise ConfigError(
            "model",
            found=f"what transformers {transformers.__version__} refuses: {' '.join(str(error).split())[:300]}",
            expected="fields of the types that its configuration has",
            hint="config.json as it was published, or model.extra.FIELD=VALUE for a field that layers read",
        ) from error
    for name, asked in arguments.items():
        if name in _ARRIVES and _plain(getattr(config, name, None)) != _plain(asked) and asked is not None:
            raise ConfigError(
                f"model, {name}",
                found=f"{getattr(config, name, None)} in the configuration that transformers {transformers.__version__} makes",
                expected=f"{asked}, as asked for",
                hint="the version of transformers in constraints.txt",
            )
    return config


# Qwen's configs drop a window that is switched off, and no layer reads it then.
_ARRIVES = (READ_BY_ALL | frozenset().union(*(facts.fields for facts in FACTS.values()))) - {"sliding_window"}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without storage; `dtype` is that of the master weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-any-return]


def install(
    model: PreTrainedModel,
    policy: MemoryPolicy,
    *,
    loss_chunk_tokens: int,
    z_loss: float = 0.0,
    store: HostStore | None = None,
    expert_ranks: ExpertRanks | None = None,
    routers: RouterSettings | None = None,
    place: StagePlace | None = None,
) -> None:
    """Put our forwards in place of Hugging Face's; weights, names and modules stay as they are.

    `expert_ranks`: those that share the experts of every layer; None: all are on every rank. `routers`: None: no losses, no updates.
    `place`: of a stage, whose modules alone are kept; None: the model is one stage.
    """
    shapes = plain_shapes(dict(model.named_parameters()) | persistent_buffers(model), model)
    parts = (StagePart(range(len(model.model.layers)), first=True, last=True),) if place is None else place.parts
    if place is not None:
        keep_stage(model, place)
    graphs = None if policy.compile is None else Graphs(policy.compile)
    routers = routers or RouterSettings()
    load, losses = ExpertLoad(), RouterLosses(routers.balance, routers.z_loss)
    capacity, biases = None if routers.capacity_factor is None else Capacity(routers.capacity_factor), {}
    for index in (index for part in parts for index in part.layers):
        layer = model.model.layers[index]
        adapter = layer_adapter(layer, model.config.model_type)
        adapter.index, adapter.expert_ranks, adapter.expert_load, adapter.router_losses = index, expert_ranks, load, losses
        adapter.capacity = capacity
        if adapter.correction_bias is not None:
            biases[index] = partial(getattr, adapter, "correction_bias")
        layer.forward = LayerExecutor(layer, adapter, policy, index, graphs)
    embedding_scale, logit_scale = _scales(model.config)
    options = LossOptions(loss_chunk_tokens, _logit_softcap(model.config), z_loss, logit_scale)
    stage = Stage(model, parts, options=options, policy=policy, store=store)
    stage.embedding_scale = embedding_scale
    stage.shapes = shapes
    stage.expert_load, stage.router_losses, stage.capacity = load, losses, capacity
    stage.router_biases = RouterBiases(biases, routers.bias_rate)
    model.forward = stage  # type: ignore[method-assign]


class Elsewhere(nn.Module):
    """Stands where another stage has a module: it has no weights here, and is not called."""


def keep_stage(model: PreTrainedModel, place: StagePlace) -> None:
    """Leave the modules of one stage in the model, under their own names; a matrix tied to the head stays where the head does."""
    base, layers = model.model, model.model.layers
    for index in range(len(layers)):
        if not any(index in own for own in place.layers):
            layers[index] = Elsewhere()
    tied = base.embed_tokens.weight is model.lm_head.weight
    if not (place.has_embedding or (place.has_head and tied)):
        base.embed_tokens = Elsewhere()
    if not place.has_head:
        base.norm, model.lm_head = Elsewhere(), Elsewhere()


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Inside, passes of `model` are those of the frozen weights alone. No pass may be under way at either end."""
    executors = [layer.forward for layer in model.model.layers if not isinstance(layer, Elsewhere)]
    for executor in executors:
        executor.use_adapters(False)
    try:
        yield
    finally:
        for executor in executors:
            executor.use_adapters(True)


def use_expert_order(model: PreTrainedModel, order: LayerOrder) -> None:
    """Take chunks of rows to experts in this order from the next pass on, the same on all ranks; nothing where all experts are here."""
    for layer in model.model.layers:
        if not isinstance(layer, Elsewhere):
            layer.forward.use_expert_order(order)


def _logit_softcap(config: PretrainedConfig) -> float | None:
    """The softcap of logits, of families whose head has one: others may carry the field and do not read it."""
    family = family_of(config.model_type)
    has_softcap = family is not None and FACTS[family].has_logit_softcap
    return getattr(config, "final_logit_softcapping", None) if has_softcap else None


def _scales(config: PretrainedConfig) -> tuple[float, float]:
    """What embeddings and logits are multiplied with outside the modules that make them."""
    family = family_of(config.model_type)
    fields = vars(config)
    return (1.0, 1.0) if family is None else (FACTS[family].embedding_scale(fields), FACTS[family].logit_scale(fields))


def build_model(
    config: PretrainedConfig,
    policy: MemoryPolicy,
    mesh: DeviceMesh,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    seed: int,
    loss_chunk_tokens: int,
    z_loss: float = 0.0,
    store: HostStore | None = None,
    expert_mesh: DeviceMesh | None = None,
    routers: RouterSettings | None = None,
    place: StagePlace | None = None,
    adapter: AdapterConfig = NO_ADAPTER,
) -> PreTrainedModel:
    """A sharded model with random weights that depend on the seed only, not on the layout. Collective over the mesh.

    `store` takes what `policy` moves to the host.
    """
    model = build_empty(
        config,
        policy,
        mesh,
        device=device,
        compute_dtype=compute_dtype,
        loss_chunk_tokens=loss_chunk_tokens,
        z_loss=z_loss,
        store=store,
        expert_mesh=expert_mesh,
        routers=routers,
        place=place,
        adapter=adapter,
    )
    initialise(model, seed)
    return model


def build_empty(
    config: PretrainedConfig,
    policy: MemoryPolicy,
    mesh: DeviceMesh,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    loss_chunk_tokens: int,
    z_loss: float = 0.0,
    store: HostStore | None = None,
    host_weights: bool = False,
    expert_mesh: DeviceMesh | None = None,
    routers: RouterSettings | None = None,
    place: StagePlace | None = None,
    adapter: AdapterConfig = NO_ADAPTER,
) -> PreTrainedModel:
    """A sharded model with unset weights: float32 (`master_dtype`), or in compute precision where float32 is on the host.

    `expert_mesh` (replicate, expert_shard, expert): its last axis shares the experts of each layer. `place`: of a stage, which alone is
    built; `mesh` is that stage's. With an `adapter` all that is not trained is frozen and in compute precision.
    """
    model = build_on_meta(config, master_dtype(compute_dtype))
    if adapter.is_trained:
        insert_adapters(model, adapter, compute_dtype)
        for layer in model.model.layers:
            insert_quantized(layer, quantized_names(adapter), compute_dtype)
    ranks = None if expert_mesh is None else ExpertRanks(expert_mesh.get_group("expert"), expert_mesh["expert"].size())
    install(
        model,
        policy,
        loss_chunk_tokens=loss_chunk_tokens,
        z_loss=z_loss,
        store=store,
        expert_ranks=ranks,
        routers=routers,
        place=place,
    )
    if host_weights:
        # Parameters only: buffers keep the precision Hugging Face made them in. Packed matrices are bytes.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(compute_dtype) if parameter.is_floating_point() else parameter.data
    if place is not None:
        stage = stage_of(model)
        stage.links = StageLinks(place, model.config.hidden_size, compute_dtype, device, stage.position.at)
    reduced = master_dtype(compute_dtype)
    layers = [model.model.layers[index] for index in stage_of(model).layers]
    experts = [layer.mlp.experts for layer in layers if hasattr(layer.mlp, "experts")]
    placement = None if expert_mesh is None else spread_experts(experts, expert_mesh)
    stage_of(model).weights = shard_model(model, layers, mesh, compute_dtype=compute_dtype, reduce_dtype=reduced, placement=placement)
    model.to_empty(device=device)
    fill_levels(model)
    return model


def master_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Dtype of the weights that are updated, their gradients and the optimizer's states."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def initialise(
    model: PreTrainedModel, seed: int, weights: nn.Module | None = None, on_progress: Callable[[str], None] | None = None
) -> None:
    """Initialise each module as Hugging Face does, one whole tensor at a time, seeded by (seed, parameter name).

    Fills the model's parameters, or those of the same names in `weights`. `on_progress` is called for each module.
    """
    done: set[int] = set()
    into = None if weights is None else dict(weights.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if not module._parameters and not module._buffers:
            continue
        if on_progress is not None:
            on_progress("initialising weights")
        if isinstance(module, QuantizedLinear):
            _initialise_packed(model, module, seed, name, into)
            continue
        shadow, copies = _shadow(module, done, name, into)
        with _seeded(seed, name):
            if isinstance(shadow, LoraFactors):
                shadow.initialise()
            else:
                model._init_weights(shadow)
        for target, full in copies:
            write_shard(target, full.data)


def _initialise_packed(
    model: PreTrainedModel, module: QuantizedLinear, seed: int, name: str, into: dict[str, nn.Parameter] | None
) -> None:
    """Pack the matrix that a model which is not quantised would have there."""
    linear = module.shadow()
    with _seeded(seed, name):
        model._init_weights(linear)
    own = dict(module.named_parameters(recurse=False))
    module.fill_from(linear, own if into is None else {key: into[f"{name}.{key}"] for key in own})


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Random numbers inside are those of (seed, module name); outside they go on as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big"))
        yield


def _shadow(
    module: nn.Module, done: set[int], prefix: str, into: dict[str, nn.Parameter] | None
) -> tuple[nn.Module, list[tuple[nn.Parameter, nn.Parameter]]]:
    """`module` with whole, empty parameters in place of shards; tied parameters only at their first owner."""
    copies, parameters = [], {}
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        target = parameter if into is None else into[f"{prefix}.{name}" if prefix else name]
        parameters[name] = nn.Parameter(torch.empty(target.shape, dtype=memory_of(target).dtype, device=parameter.device))
        copies.append((target, parameters[name]))
    shadow = copy.copy(module)
    shadow.__dict__["_parameters"] = {name: parameters.get(name) for name in module._parameters}
    return shadow, copies
