"""AdamW on the sharded float32 master weights, and clipping by the true global gradient norm."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .config import OptimConfig


def is_decayed(module: nn.Module, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices (and stacks of them) do, norms, biases and embeddings do not.

    `module` is the parameter's owner. A tied output matrix is the embedding, and is not decayed.
    """
    return parameter.ndim >= 2 and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, in the groups `decay` and `no_decay`.

    Groups carry the parameters' names (`param_names`) in the model's own order. States have the parameters' dtype,
    device and sharding; nothing is gathered. Call after sharding: FSDP replaces the parameters.
    """
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    owners = _owners(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[is_decayed(owners[parameter], parameter)].append((name, parameter))
    return torch.optim.AdamW(
        [
            {"params": named, "name": "decay" if decay else "no_decay", "weight_decay": config.weight_decay if decay else 0.0}
            for decay, named in groups.items()
            if named
        ],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


def _owners(model: nn.Module) -> dict[Tensor, nn.Module]:
    owners: dict[Tensor, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            # First owner wins, as in named_parameters: with tied weights that is the embedding.
            owners.setdefault(parameter, module)
    return owners


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next update, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float | None) -> float:
    """Scales every gradient so that the global L2 norm is at most `max_norm` (None: measures only); returns the norm before.

    Counts each element of the full gradient once: squares are summed over the mesh axes a gradient is sharded on,
    never over those it is replicated on. Collective: every rank of the mesh must call it. A norm that is not finite
    is returned and nothing is scaled. The scale is max_norm / (norm + 1e-6), as in torch.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = math.sqrt(_sum_of_squares(gradients))
    if max_norm is not None and math.isfinite(norm) and (scale := max_norm / (norm + 1e-6)) < 1.0:
        for gradient in gradients:
            _local(gradient).mul_(scale)
    return norm


def _sum_of_squares(gradients: list[Tensor]) -> float:
    alike: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        alike[_sharding(gradient)].append(_local(gradient))
    total = 0.0
    for (mesh, axes), parts in alike.items():
        # float64 for the sum over tensors only: products inside a tensor stay in its own precision, as in torch.
        norms = torch.stack([torch.linalg.vector_norm(part).double() for part in parts])
        squares = norms.square().sum()
        for axis in axes:
            assert mesh is not None
            dist.all_reduce(squares, group=mesh.get_group(axis))
        total += squares.item()
    return total


def _sharding(gradient: Tensor) -> tuple[DeviceMesh | None, tuple[int, ...]]:
    """The mesh and those of its axes that hold different elements; (None, ()) for a plain tensor."""
    if not isinstance(gradient, DTensor):
        return None, ()
    assert not any(placement.is_partial() for placement in gradient.placements), "gradients are reduced before they are clipped"
    return gradient.device_mesh, tuple(axis for axis, placement in enumerate(gradient.placements) if placement.is_shard())


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
