"""AdamW on the sharded float32 master weights, and clipping by the true global gradient norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...model.adapters.names import is_factor_b
from ...model.families import facts_of, family_of
from ...parallel.sharding.matrix_plan import is_matrix
from ...parallel.sharding.parts import local
from .algorithms import LIBRARY
from .config import MUON, OptimConfig, StateDtype
from .norm import NormMeter, NormScope, clip_scale
from .sharded_adamw import fused_adamw

RATIO = "lr_ratio"
"""Key of a group of parameters whose learning rate is another than the schedule's, by this factor."""


def is_decayed(module: nn.Module, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices (and stacks of them) do, norms, biases and embeddings do not.

    `module` is the parameter's owner. A tied output matrix is the embedding, and is not decayed.
    """
    return parameter.ndim >= 2 and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def build_optimizer(
    model: nn.Module, config: OptimConfig, weights: nn.Module | None = None, *, b_lr_ratio: float = 1.0
) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters, in the groups `decay` and `no_decay`, and `lora_b` where that has a rate of its own.

    Fused AdamW, or `config.algorithm`; matrices that Muon updates are the group `muon`.
    Groups carry the parameters' names (`param_names`) in the model's own order. States have the parameters' dtype (or
    `state_dtype`), device and sharding; nothing is gathered. Call after sharding: FSDP replaces the parameters.
    `weights`: the parameters of the same names that are updated instead of the model's own. `b_lr_ratio`: the learning rate of
    adapters' B over that of everything else (LoRA+).
    """
    updated, ratios = dict((weights or model).named_parameters()), {"muon": config.muon_lr_ratio, "lora_b": b_lr_ratio}
    named_groups: list[dict[str, Any]] = [
        {"params": [(name, updated[name]) for name in names], "name": kind, "weight_decay": weight_decay(kind, config)}
        | ({RATIO: ratios[kind]} if kind in ratios else {})
        for kind, names in parameter_groups(model, b_lr_ratio=b_lr_ratio, by_muon=config.algorithm == MUON).items()
    ]
    if config.algorithm == MUON:
        from .muon import Muon

        return Muon(named_groups, config, transposed_experts=_has_transposed_experts(model))
    if config.algorithm in LIBRARY:
        from .library import LibraryOptimizer

        return LibraryOptimizer(named_groups, config)
    if config.state_dtype is not StateDtype.FLOAT32:
        from .lowbit import build_lowbit

        return build_lowbit(named_groups, config)
    return fused_adamw(named_groups, config)


def weight_decay(kind: str, config: OptimConfig) -> float:
    """Weight decay of a group of parameters."""
    return 0.0 if kind == "no_decay" else config.weight_decay


def parameter_groups(model: nn.Module, *, b_lr_ratio: float = 1.0, by_muon: bool = False) -> dict[str, list[str]]:
    """Names of the trainable parameters by group, in the model's order; groups without any are left out. Asks for whole shapes.

    `by_muon`: matrices that Muon updates are a group of their own.
    """
    groups: dict[str, list[str]] = {"muon": [], "decay": [], "no_decay": [], "lora_b": []}
    owners = _owners(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_fast = b_lr_ratio != 1.0 and is_factor_b(name)
            kind = "lora_b" if is_fast else "decay" if is_decayed(owners[parameter], parameter) else "no_decay"
            groups["muon" if by_muon and is_matrix(name, parameter.shape) else kind].append(name)
    return {kind: names for kind, names in groups.items() if names}


def _has_transposed_experts(model: nn.Module) -> bool:
    """Whether stacks of experts are (E, inputs, outputs), gate and up column by column."""
    family = family_of(getattr(getattr(model, "config", None), "model_type", None))
    experts = None if family is None else facts_of(family).experts
    return experts is not None and experts.transposed


def _owners(model: nn.Module) -> dict[Tensor, nn.Module]:
    owners: dict[Tensor, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            # First owner wins, as in named_parameters: with tied weights that is the embedding.
            owners.setdefault(parameter, module)
    return owners


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next update, for every group: `lr` times the group's own ratio, where it has one."""
    for group in optimizer.param_groups:
        rate = lr * group.get(RATIO, 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float | None, scope: NormScope | None = None) -> float:
    """Scales every gradient so that the global L2 norm is at most `max_norm` (None: measures only); returns the norm before.

    Collective: every rank of the mesh must call it, and of `scope` where `model` is a stage. A norm that is not finite is returned and
    nothing is scaled.
    """
    with_gradient = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    meter, parameters = NormMeter(scope), [parameter for parameter, _ in with_gradient]
    for parameter, gradient in with_gradient:
        meter.add(parameter, local(gradient))
    norm = meter.total(parameters)
    if (scale := clip_scale(norm, max_norm)) < 1.0:
        for _, gradient in with_gradient:
            local(gradient).mul_(scale)
    return norm
